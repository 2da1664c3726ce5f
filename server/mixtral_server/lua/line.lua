-- The lines of waiting jobs: one of each user, one of all suspects, and beside them what a key's bound holds back.

local function lined_key(key) return t .. ':lined:' .. key end

local function line_of(job)
  if job.deaths >= SUSPECT_DEATHS then return t .. ':suspects' end
  return t .. ':wait:' .. job.owner
end

-- A job that only native workers can serve, by what it asks for or because one of them began it, stands here beside its line, and ':closed'
-- counts them all; aime_claim.lua reads both.
local function natives_of(job)
  if job.deaths >= SUSPECT_DEATHS then return t .. ':native_suspects' end
  return t .. ':native:' .. job.owner
end

local function needs_native(job) return job.native or job.n > 0 end

-- by: 1 or -1.
local function count_waiting(job, by)
  count(t .. ':waiting', job.prio, by)
  count(t .. ':waiting_of', job.owner, by)
  count(t .. ':tokens_of', '', by * job.estimate) -- of all users
  count(t .. ':tokens_of', job.owner, by * job.estimate)
  if tonumber(job.prio) > 0 then
    if by > 0 then call('ZADD', t .. ':lower', job.due, job.id) else call('ZREM', t .. ':lower', job.id) end
  end
end

local function line_up(job)
  call('ZADD', line_of(job), job.due, job.id)
  if needs_native(job) then count(t .. ':closed', 'jobs', call('ZADD', natives_of(job), job.due, job.id)) end
  if job.key ~= '' then call('ZADD', lined_key(job.key), job.due, job.id) end
  if job.deaths < SUSPECT_DEATHS and level_of_user(job.owner) ~= 0 then stand_by_first(job.owner) end
  has_work = true
end

local function step_out(job)
  call('ZREM', line_of(job), job.id)
  if needs_native(job) then count(t .. ':closed', 'jobs', -call('ZREM', natives_of(job), job.id)) end
  if job.key ~= '' then call('ZREM', lined_key(job.key), job.id) end
  if job.deaths < SUSPECT_DEATHS then stand_by_first(job.owner) end
end

-- Of a key with a bound on its running jobs, only so many are admitted: those that run and those in line (':lined'). The others wait,
-- parked outside every line, so that a claim never meets a job that it may not take. Whoever changes one of the three calls this:
-- the first due are admitted.
local function admit(key)
  while true do
    local values = call('HMGET', cap_key(key), 'most', 'admitted')
    local most, admitted = tonumber(values[1]), tonumber(values[2])
    local parked = call('ZRANGE', parked_key(key), 0, 0, 'WITHSCORES')
    local lined = call('ZREVRANGE', lined_key(key), 0, 0, 'WITHSCORES')
    if parked[1] and admitted < most then
      call('ZREM', parked_key(key), parked[1])
      call('DECR', t .. ':parked')
      call('HINCRBY', cap_key(key), 'admitted', 1)
      line_up(load_job(parked[1]))
    elseif lined[1] and (admitted > most or parked[1] and tonumber(parked[2]) < tonumber(lined[2])) then
      call('HINCRBY', cap_key(key), 'admitted', -1)
      step_out(load_job(lined[1]))
      call('ZADD', parked_key(key), lined[2], lined[1])
      call('INCR', t .. ':parked')
    else
      if admitted == 0 then call('DEL', cap_key(key)) end -- and none is parked: a bound is 1 or more
      return
    end
  end
end

-- A job that is new, or back from the dead, waits. most: what its key's bound is now; else it stays what it is.
local function enqueue(job, most)
  count_waiting(job, 1)
  if job.key == '' then return line_up(job) end
  call(most and 'HSET' or 'HSETNX', cap_key(job.key), 'most', most or job.most)
  call('HINCRBY', cap_key(job.key), 'admitted', 0)
  call('ZADD', parked_key(job.key), job.due, job.id)
  call('INCR', t .. ':parked')
  admit(job.key)
end
