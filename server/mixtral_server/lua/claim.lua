-- Leases: which waiting job a session gets next. Lower priorities first; within one, suspects by arrival, then the least served
-- user's oldest job.

local MAX_REPLY_BYTES = 8 * 1024 * 1024 -- of requests in one answer; what is left over comes with the next turn
local MAX_EXPIRED_HERE = 100 -- jobs past their deadline met in one call

local function lease(job, session)
  local _, least = head_of_ring(job.prio)
  if least and job.deaths < SUSPECT_DEATHS then call('HSET', t .. ':vclock', job.prio, least) end
  local cost = estimated_units(job)
  call('HINCRBY', load_key(job.prio), job.owner, cost)
  charge(job.prio, job.owner, cost)
  dequeue(job)
  call('ZREM', t .. ':deadlines', job.id)
  call('HSETNX', job_key(job.id), 'started', now)
  call('HSET', job_key(job.id), 'state', 'leased', 'session', session, 'base', job.n, 'cost', cost)
  local attempt = call('HINCRBY', job_key(job.id), 'attempt', 1)
  call('HSET', held_key(session), job.id, attempt)
  count_lease()
end

-- The next waiting job's id, or nil.
local function next_in_line(may_be_suspect)
  local prios = call('HKEYS', t .. ':waiting')
  table.sort(prios, function(a, b) return tonumber(a) < tonumber(b) end)
  for _, prio in ipairs(prios) do
    local suspect = may_be_suspect and call('ZRANGE', t .. ':suspects:' .. prio, 0, 0)[1]
    if suspect then return suspect end
    local user = head_of_ring(prio)
    if user then return call('ZRANGE', t .. ':wait:' .. prio .. ':' .. user, 0, 0)[1] end
  end
  return nil
end

-- Lease up to room jobs. Returns their ids. A job past its deadline expires here: it must never start.
local function claim(session, room, may_be_suspect)
  local ids, bytes, expired = {}, 0, 0
  while #ids < room and bytes < MAX_REPLY_BYTES and expired < MAX_EXPIRED_HERE do
    local id = next_in_line(may_be_suspect)
    if not id then break end
    local job = load_job(id)
    local deadline = call('ZSCORE', t .. ':deadlines', id)
    if deadline and tonumber(deadline) <= now then
      finish(job, 'expired', 'expired')
      expired = expired + 1
    else
      lease(job, session)
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

-- What the worker needs to go on with a job: {id, attempt, request, deaths, bytes of text, ids of each log entry}
local function job_reply(id)
  local values = call('HMGET', job_key(id), 'attempt', 'spec', 'deaths', 'bytes')
  local produced = {}
  for _, entry in ipairs(call('XRANGE', log_key(id), '-', '+')) do
    local fields = table_of(entry[2])
    if fields.ids then produced[#produced + 1] = fields.ids end
  end
  return {id, values[1], values[2], values[3], values[4], produced}
end
