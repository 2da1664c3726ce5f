-- Leases: which waiting job a session gets next. Better levels first; within one, suspects, then the least served user's first job.

local MAX_REPLY_BYTES = 8 * 1024 * 1024 -- of requests in one answer; what is left over comes with the next turn
local MAX_EXPIRED_HERE = 100 -- jobs past their deadline met in one call

local ETA_BOUNDS = {100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000} -- ms

-- The job's record with its request.
local function load_request(id)
  local job = load_job(id)
  job.spec = call('HGET', job_key(id), 'spec')
  return job
end

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
  count(t .. ':eta', bucket, 1)
  count(t .. ':eta', 'sum', off)
  if waited > tonumber(job.eta_p90) then count(t .. ':eta', 'late', 1) end
end

-- least: the virtual time of the level's least served user, if anybody stands there.
local function lease(job, level, least, session)
  if least and job.deaths < SUSPECT_DEATHS then served[level] = least end
  if not job.started then
    if job.eta then judge_eta(job) end
    job.started = now
  end
  job.state, job.session, job.attempt = 'leased', session, job.attempt + 1
  job.base, job.cost, job.level = job.n, estimated_units(job), level
  count(load_key(level), job.owner, job.cost)
  charge(level, job.owner, job.cost)
  dequeue(job)
  call('HSET', job_key(job.id), 'state', 'leased', 'session', session, 'base', job.base, 'cost', job.cost, 'level', level,
    'attempt', job.attempt, 'started', job.started)
end

-- The next waiting job's id, its level, and the virtual time of the least served user there, or nil.
local function next_in_line(may_be_suspect)
  local suspect = may_be_suspect and call('ZRANGE', t .. ':suspects', 0, 0, 'WITHSCORES') or {}
  local level_of_suspect = suspect[1] and level_of(tonumber(suspect[2]))
  for level = 0, LAST_LEVEL do
    if level == level_of_suspect then return suspect[1], level end
    local user, least = head_of_ring(level)
    if user then return call('ZRANGE', t .. ':wait:' .. user, 0, 0)[1], level, least end
    if level == 0 and not suspect[1] and call('EXISTS', t .. ':stands') == 0 then return nil end
  end
  return nil
end

-- Lease up to room jobs. Returns their records, with their requests. A job past its deadline expires here: it must never start.
-- next_job: next_in_line or its like.
local function claim(session, room, may_be_suspect, next_job)
  local jobs, attempts, bytes, expired = {}, {}, 0, 0
  while #jobs < room and bytes < MAX_REPLY_BYTES and expired < MAX_EXPIRED_HERE do
    local id, level, least = (next_job or next_in_line)(may_be_suspect)
    if not id then break end
    local job = load_request(id)
    local deadline = call('ZSCORE', t .. ':deadlines', id)
    if deadline and tonumber(deadline) <= now then
      finish(job, 'expired', 'expired')
      expired = expired + 1
    else
      if deadline then call('ZREM', t .. ':deadlines', id) end
      lease(job, level, least, session)
      if job.deaths >= SUSPECT_DEATHS then
        may_be_suspect = false
        call('HSET', session_key(session), 'suspect', id)
      end
      jobs[#jobs + 1] = job
      attempts[#attempts + 1], attempts[#attempts + 2] = id, job.attempt
      bytes = bytes + #job.spec
    end
  end
  if #jobs > 0 then
    call('HSET', held_key(session), unpack(attempts))
    count_lease()
  end
  return jobs
end

-- How long a whole batch with room for so many jobs still waits to be filled, ms; 0: take what there is. It begins to wait when a
-- worker first finds too few, so that no job waits longer beside a free worker; ':filling' says since when, to every session.
local function fill_ms(room, linger)
  write_counts()
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
local function job_reply(job)
  local produced = {}
  for _, entry in ipairs(job.n > 0 and call('XRANGE', log_key(job.id), '-', '+') or {}) do
    local fields = table_of(entry[2])
    if fields.ids then produced[#produced + 1] = fields.ids end
  end
  return {job.id, job.attempt, job.spec, job.deaths, job.bytes, job.level, produced}
end
