-- What AIME workers send: the whole text of a job so far and what else they say of it, or its result. The text goes into the log, as far as
-- it is new; what does not go on from the former text replaces it.
-- ARGV: session, key, lease, then 8 of each post: job, attempt, '=' and the text or '', tokens generated or '', tokens of the prompt or '',
--       what it said as JSON or '', ending (stop or error) or '', error detail or ''
-- → for each {'ok'} or {'lost', whether it is told so for the first time, state or ''}
local session = ARGV[1]
local is_known = call('HGET', session_key(session), 'key') == ARGV[2]
use_reserve()
move_times()
if is_known then
  call('ZADD', t .. ':sessions', now + ARGV[3], session)
  call('HDEL', session_key(session), 'mute')
end
local held = is_known and table_of(call('HGETALL', held_key(session))) or {}

-- Neighbouring offsets of one log entry: all but the last are of tokens whose text comes with the last.
local function append_text(job, before, length, added)
  local id = added == '' and 0 or tonumber(string.sub(redis.sha1hex(added), 1, 7), 16)
  local ids = '[' .. string.rep('0,', length - before - 1) .. string.format('%.0f', id) .. ']'
  local texts = '[' .. string.rep('"",', length - before - 1) .. cjson.encode(added) .. ']'
  call('XADD', log_key(job.id), length .. '-0', 'ids', ids, 'texts', texts)
  call('HSET', job_key(job.id), 'n', length)
  call('HSETNX', job_key(job.id), 'first', now)
  count(t .. ':totals', 'tokens', length - before)
  news[#news + 1] = '["' .. job.id .. '",' .. (before + 1) .. ',' .. ids .. ',' .. texts .. ']'
end

-- The last offset is kept for the result: no text is lost for want of one.
local function take_text(job, text, tokens, is_last)
  local values = call('HMGET', job_key(job.id), 'bytes', 'max')
  local bytes, max = tonumber(values[1]), tonumber(values[2])
  if redis.sha1hex(string.sub(text, 1, bytes)) ~= job.text then
    start_anew(job)
    bytes = 0
  end
  local added = string.sub(text, bytes + 1)
  local wanted = (added ~= '' or is_last and job.n == 0 and not tokens) and job.n + 1 or job.n
  if is_last or added ~= '' then wanted = math.max(wanted, tokens or 0) end
  local length = math.min(wanted, is_last and max or max - 1)
  if length > job.n then
    append_text(job, job.n, length, added)
    job.n, bytes = length, #text
  end
  job.text = redis.sha1hex(string.sub(text, 1, bytes))
  call('HSET', job_key(job.id), 'bytes', bytes, 'text', job.text)
end

local function take(job, at)
  local text, tokens, prompt_tokens, said, ending = ARGV[at + 2], tonumber(ARGV[at + 3]), ARGV[at + 4], ARGV[at + 5], ARGV[at + 6]
  local key = job_key(job.id)
  call('HSET', key, 'heard', read_clock().now)
  if prompt_tokens ~= '' then
    call('HSET', key, 'prompt_tokens', prompt_tokens)
    job.prompt_tokens = tonumber(prompt_tokens)
  end
  if job.state == 'leased' then
    job.state = 'streaming'
    call('HSET', key, 'state', 'streaming')
  end
  if text ~= '' then
    take_text(job, string.sub(text, 2), tokens, ending ~= '')
  elseif ending ~= '' and ending ~= 'error' then
    take_text(job, '', tokens, true)
  end
  if said ~= '' then call('HSET', key, ending == '' and 'progress' or 'result', said) end
  if ending ~= '' then call('HDEL', key, 'progress') end
  if ending == 'error' then
    finish(job, 'failed', 'error', ARGV[at + 7])
  elseif ending ~= '' then -- AIME's workers do not say why an answer ended
    local is_cut = tokens and tokens >= tonumber(call('HGET', key, 'max'))
    finish(job, 'done', is_cut and 'length' or 'stop')
  end
end

-- A worker that posts for a job it has no more is told once: AIME's library may never send progress again when it is told too late.
local function disown(id)
  local values = call('HMGET', job_key(id), 'state', 'told')
  if not values[1] then return {'lost', 0, ''} end
  if values[2] == session then return {'lost', 0, values[1]} end
  call('HSET', job_key(id), 'told', session)
  return {'lost', 1, values[1]}
end

local replies = {}
for at = 4, #ARGV, 8 do
  local id = ARGV[at]
  if held[id] == ARGV[at + 1] then
    take(load_job(id), at)
    if ARGV[at + 6] ~= '' then held[id] = nil end
    replies[#replies + 1] = {'ok'}
  else
    replies[#replies + 1] = disown(id)
  end
end
conclude()
return replies
