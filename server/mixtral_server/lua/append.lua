-- Frames into logs. The answer to a frame depends on the log alone: offset n+1 is appended, up to n is a repeat, beyond is refused
-- with the offset expected.

local appended = 0

-- JSON arrays → (part of them from the skip+1st to the last, JSON), and the bytes of its texts.
local function cut(ids, texts, skip, last)
  local all_ids, all_texts = cjson.decode(ids), cjson.decode(texts)
  local new_ids, new_texts, bytes = {}, {}, 0
  for i = skip + 1, last do
    new_ids[#new_ids + 1] = all_ids[i]
    new_texts[#new_texts + 1] = all_texts[i]
    bytes = bytes + #all_texts[i]
  end
  return cjson.encode(new_ids), cjson.encode(new_texts), bytes
end

-- What of the frame the log lacks, as far as the job's max tokens allow. Returns the log's new length.
local function append_tokens(frame, n, bytes, max, state)
  local skip = n + 1 - frame.offset
  local last = math.min(frame.count, max - frame.offset + 1)
  if skip < 0 or last <= skip then return n end
  local ids, texts, size = frame.ids, frame.texts, frame.bytes
  if skip > 0 or last < frame.count then ids, texts, size = cut(ids, texts, skip, last) end
  local length = n + last - skip
  call('XADD', log_key(frame.job), length .. '-0', 'ids', ids, 'texts', texts)
  call('HSET', job_key(frame.job), 'n', length, 'bytes', bytes + size)
  if state == 'leased' then call('HSET', job_key(frame.job), 'state', 'streaming') end
  if n == 0 then call('HSETNX', job_key(frame.job), 'first', now) end
  news[#news + 1] = '["' .. frame.job .. '",' .. (n + 1) .. ',' .. ids .. ',' .. texts .. ']'
  appended = appended + length - n
  return length
end

-- One frame that has passed the fence. Returns whether the lease of its job ended, and the offset expected where the log wants another.
local function append(frame)
  local values = call('HMGET', job_key(frame.job), 'n', 'bytes', 'max', 'state')
  local before, max = tonumber(values[1]), tonumber(values[3])
  if frame.prompt_tokens ~= '' then call('HSET', job_key(frame.job), 'prompt_tokens', frame.prompt_tokens) end
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
