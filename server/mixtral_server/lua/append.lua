-- Frames into logs. The answer to a frame depends on the log alone: offset n+1 is appended, up to n is a repeat, beyond is refused
-- with the offset expected.

local appended = 0

-- A JSON array of numbers or strings → its part from the skip+1st to the last, JSON, and the bytes of that part's strings.
local function cut(json, skip, last)
  local part, bytes = {}, 0
  for i, one in ipairs(cjson.decode(json)) do
    if i > skip and i <= last then
      part[#part + 1] = one
      if type(one) == 'string' then bytes = bytes + #one end
    end
  end
  return cjson.encode(part), bytes
end

-- What of the frame the log lacks, as far as the job's max tokens allow. Returns the log's new length. The frame is marked: 'a' appended as
-- it is, 'c' cut.
local function append_tokens(frame, n, bytes, max, state)
  local skip = n + 1 - frame.offset
  local last = math.min(frame.count, max - frame.offset + 1)
  if skip < 0 or last <= skip then return n end
  local ids, texts, size, logprobs = frame.ids, frame.texts, frame.bytes, frame.logprobs
  frame.mark = 'a'
  if skip > 0 or last < frame.count then
    frame.mark = 'c'
    ids = cut(ids, skip, last)
    texts, size = cut(texts, skip, last)
    if logprobs ~= '' then logprobs = cut(logprobs, skip, last) end
  end
  local length = n + last - skip
  if logprobs == '' then
    call('XADD', log_key(frame.job), length .. '-0', 'ids', ids, 'texts', texts)
  else
    call('XADD', log_key(frame.job), length .. '-0', 'ids', ids, 'texts', texts, 'logprobs', logprobs)
  end
  call('HSET', job_key(frame.job), 'n', length, 'bytes', bytes + size)
  if state == 'leased' then call('HSET', job_key(frame.job), 'state', 'streaming') end
  if n == 0 then call('HSETNX', job_key(frame.job), 'first', now) end
  if is_heard then
    local more = logprobs ~= '' and ',' .. logprobs or ''
    appends[#appends + 1] = '["' .. frame.job .. '",' .. (n + 1) .. ',' .. ids .. ',' .. texts .. more .. ']'
  end
  appended = appended + length - n
  return length
end

-- One frame that has passed the fence. Returns whether the lease of its job ended, and the offset expected where the log wants another.
local function append(frame)
  local values = call('HMGET', job_key(frame.job), 'n', 'bytes', 'max', 'state')
  local before, max = tonumber(values[1]), tonumber(values[3])
  if frame.prompt_tokens ~= '' then call('HSET', job_key(frame.job), 'prompt_tokens', frame.prompt_tokens) end
  if frame.dropped ~= '' then call('HSET', job_key(frame.job), 'dropped', frame.dropped) end
  local n = append_tokens(frame, before, tonumber(values[2]), max, values[4])
  local last = frame.offset + frame.count - 1

  if frame.ending == 'error' then
    finish(load_job(frame.job), 'failed', 'error', frame.detail)
  elseif frame.ending == 'release' then
    requeue(load_job(frame.job))
  elseif n == max and last > max then -- the worker overran what was asked: the log is never longer than that
    finish(load_job(frame.job), 'done', 'length')
  elseif frame.offset > before + 1 then
    return false, before + 1
  elseif frame.ending ~= '' then
    if last ~= n then return false, n + 1 end -- an end that does not follow on the log's last token
    finish(load_job(frame.job), 'done', frame.ending)
  else
    return false, nil
  end
  return true, nil
end
