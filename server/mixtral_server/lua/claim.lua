-- Leases: which waiting job a session gets next. Better levels first; within one, suspects, then the least served user's first job.

local MAX_REPLY_BYTES = 8 * 1024 * 1024 -- of requests in one answer; what is left over comes with the next turn
local MAX_EXPIRED_HERE = 100 -- jobs past their deadline met in one call

local ETA_BOUNDS = {100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000} -- ms

-- A job that was told an ETA when it was put starts.
local function judge_eta(job)
  local waited = now - job.created
  local off = math.abs(waited - job.eta)
  local bucket = 'more'
  for _, bound in ipairs(ETA_BOUNDS) do
    if off <= bound then
      bucket = bound
      break
    end
  end
  call('HINCRBY', t .. ':eta', bucket, 1)
  call('HINCRBY', t .. ':eta', 'sum', off)
  if waited > tonumber(job.eta_p90) then call('HINCRBY', t .. ':eta', 'late', 1) end
end

local function lease(job, level, session)
  local _, least = head_of_ring(level)
  if least and job.deaths < SUSPECT_DEATHS then call('HSET', t .. ':vclock', level, least) end
  local cost = estimated_units(job)
  call('HINCRBY', load_key(level), job.owner, cost)
  charge(level, job.owner, cost)
  dequeue(job)
  call('ZREM', t .. ':deadlines', job.id)
  if call('HSETNX', job_key(job.id), 'started', now) == 1 and job.eta then judge_eta(job) end
  call('HSET', job_key(job.id), 'state', 'leased', 'session', session, 'base', job.n, 'cost', cost, 'level', level)
  local attempt = call('HINCRBY', job_key(job.id), 'attempt', 1)
  call('HSET', held_key(session), job.id, attempt)
  count_lease()
end

-- The next waiting job's id and its level, or nil.
local function next_in_line(may_be_suspect)
  local suspect = may_be_suspect and call('ZRANGE', t .. ':suspects', 0, 0, 'WITHSCORES') or {}
  local level_of_suspect = suspect[1] and level_of(tonumber(suspect[2]))
  if not suspect[1] and call('EXISTS', t .. ':stands') == 0 then return nil end
  for level = 0, LAST_LEVEL do
    if level == level_of_suspect then return suspect[1], level end
    local user = head_of_ring(level)
    if user then return call('ZRANGE', t .. ':wait:' .. user, 0, 0)[1], level end
  end
  return nil
end

-- Lease up to room jobs. Returns their ids. A job past its deadline expires here: it must never start. next_job: next_in_line or its like.
local function claim(session, room, may_be_suspect, next_job)
  local ids, bytes, expired = {}, 0, 0
  while #ids < room and bytes < MAX_REPLY_BYTES and expired < MAX_EXPIRED_HERE do
    local id, level = (next_job or next_in_line)(may_be_suspect)
    if not id then break end
    local job = load_job(id)
    local deadline = call('ZSCORE', t .. ':deadlines', id)
    if deadline and tonumber(deadline) <= now then
      finish(job, 'expired', 'expired')
      expired = expired + 1
    else
      lease(job, level, session)
      if job.deaths >= SUSPECT_DEATHS then
        may_be_suspect = false
        call('HSET', session_key(session), 'suspect', id)
      end
      ids[#ids + 1] = id
      bytes = bytes + call('HSTRLEN', job_key(id), 'spec')
    end
  end
  return ids
end

-- How long a whole batch with room for so many jobs still waits to be filled, ms; 0: take what there is. It begins to wait when a
-- worker first finds too few, so that no job waits longer beside a free worker; ':filling' says since when, to every session.
local function fill_ms(room, linger)
  local waiting = -(call('GET', t .. ':parked') or 0)
  for _, jobs in ipairs(call('HVALS', t .. ':waiting')) do waiting = waiting + jobs end
  local since = tonumber(call('GET', t .. ':filling') or now)
  local left = since + linger - now
  if waiting <= 0 or waiting >= room or left <= 0 or since > now then
    call('DEL', t .. ':filling')
    return 0
  end
  call('SET', t .. ':filling', since)
  return left
end

-- What the worker needs to go on with a job: {id, attempt, request, deaths, bytes of text, level, ids of each log entry}
local function job_reply(id)
  local values = call('HMGET', job_key(id), 'attempt', 'spec', 'deaths', 'bytes', 'level')
  local produced = {}
  for _, entry in ipairs(call('XRANGE', log_key(id), '-', '+')) do
    local fields = table_of(entry[2])
    if fields.ids then produced[#produced + 1] = fields.ids end
  end
  return {id, values[1], values[2], values[3], values[4], values[5], produced}
end
