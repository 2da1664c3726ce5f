-- Frames into logs. The answer to a frame depends on the log alone: offset n+1 is appended, up to n is a repeat, beyond is refused
-- with the offset expected.

-- A frame as records.py packs it: this head, then as many bytes of job, ids, texts, logprobs and error detail as it says. -1: not said.
local HEAD = '>HI4I4I4I4i4i4BI4I4I4I4' -- size of job, attempt, offset, count, bytes of text, prompt tokens, dropped, ending, four sizes
local ENDINGS = {[0] = '', 'stop', 'length', 'error', 'release'}

local sub, format = string.sub, string.format
local numbers = {} -- what text says, where many frames say the same
local appended = 0

local function number(text)
  local known = numbers[text]
  if not known then
    known = tonumber(text)
    numbers[text] = known
  end
  return known
end

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

-- Offsets n+1 to last into the log, and to those who listen. ids, texts, and logprobs or '': JSON. Returns last as text: an entry's id.
local function log(id, n, last, ids, texts, logprobs)
  local entry, more = format('%d', last), ''
  if logprobs == '' then
    call('XADD', log_key(id), entry, 'ids', ids, 'texts', texts)
  else
    call('XADD', log_key(id), entry, 'ids', ids, 'texts', texts, 'logprobs', logprobs)
    more = ',' .. logprobs
  end
  if is_heard then appends[#appends + 1] = '["' .. id .. '",' .. n + 1 .. ',' .. ids .. ',' .. texts .. more .. ']' end
  appended = appended + last - n
  return entry
end

-- What of the frame the log lacks, as far as the job's max tokens allow. The frame is marked: 'a' appended as it is, 'c' cut.
-- n and bytes of the job grow here; append() writes them.
local function append_tokens(frame, job)
  local n = job.n
  local skip = n + 1 - frame.offset
  local last = math.min(frame.count, job.max - frame.offset + 1)
  if skip < 0 or last <= skip then return end
  local ids, texts, size, logprobs = frame.ids, frame.texts, frame.bytes, frame.logprobs
  frame.mark = 'a'
  if skip > 0 or last < frame.count then
    frame.mark = 'c'
    ids = cut(ids, skip, last)
    texts, size = cut(texts, skip, last)
    if logprobs ~= '' then logprobs = cut(logprobs, skip, last) end
  end
  job.n, job.bytes = n + last - skip, job.bytes + size
  log(job.id, n, job.n, ids, texts, logprobs)
end

-- A frame of nothing but the next tokens of a chat that runs, as nearly all are. False: append() must look at it.
local function append_next(id, offset, count, bytes, ids, texts, logprobs)
  local key = job_key(id)
  local values = call('HMGET', key, 'n', 'bytes', 'max', 'state')
  local n = offset + count - 1
  if tonumber(values[1]) ~= offset - 1 or n < offset or n > number(values[3]) or values[4] ~= 'streaming' then return false end
  local last = log(id, offset - 1, n, ids, texts, logprobs)
  call('HSET', key, 'n', last, 'bytes', format('%d', values[2] + bytes))
  return true
end

-- What append() must know of a job that goes on.
local function load_length(id)
  local values = call('HMGET', job_key(id), 'n', 'bytes', 'max', 'state')
  return {id = id, n = tonumber(values[1]), bytes = tonumber(values[2]), max = tonumber(values[3]), state = values[4]}
end

-- Length and bytes of the log into the job's hash, and what few frames change beside them. before: the log's length before the frame.
local function write_more(frame, job, before)
  if job.n > before then job.state = 'streaming' end
  local fields = {'n', job.n, 'bytes', job.bytes, 'state', job.state}
  local first = before == 0 and job.n > 0 and now or ''
  for name, value in pairs({prompt_tokens = frame.prompt_tokens, dropped = frame.dropped, first = first}) do
    if value ~= -1 and value ~= '' then
      job[name] = value
      fields[#fields + 1], fields[#fields + 2] = name, value
    end
  end
  call('HSET', job_key(job.id), unpack(fields))
end

-- One frame that has passed the fence. Returns whether the lease of its job ended, and the offset expected where the log wants another.
local function append(frame)
  local job = frame.ending == '' and load_length(frame.job) or load_job(frame.job)
  local before = job.n
  append_tokens(frame, job)
  if frame.prompt_tokens >= 0 or frame.dropped >= 0 or job.state == 'leased' then
    write_more(frame, job, before)
  elseif job.n > before then
    call('HSET', job_key(job.id), 'n', job.n, 'bytes', job.bytes)
  end
  local last = frame.offset + frame.count - 1

  if frame.ending == 'error' then
    finish(job, 'failed', 'error', frame.detail)
  elseif frame.ending == 'release' then
    requeue(job)
  elseif job.n == job.max and last > job.max then -- the worker overran what was asked: the log is never longer than that
    finish(load_job(job.id), 'done', 'length')
  elseif frame.offset > before + 1 then
    return false, before + 1
  elseif frame.ending ~= '' then
    if last ~= job.n then return false, job.n + 1 end -- an end that does not follow on the log's last token
    finish(job, 'done', frame.ending)
  else
    return false, nil
  end
  return true, nil
end
