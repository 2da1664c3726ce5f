-- What happens to a job after it was put: charged, given back, ended; and how sessions end.

-- ---------------------------------------------------------------------------------------- share

-- Move a user's virtual time; back no further than where it stood when the user came. One who was not seen since all was
-- forgotten joins with what ':load' says.
local function charge(level, user, cost)
  local place = stand(user)
  if place and place.level == level then
    place.at = math.max(place.floor, time_of(user) + cost)
    moved[user] = place
  elseif call('ZSCORE', spent_key(level), user) then
    call('ZINCRBY', spent_key(level), cost, user)
  end
end

-- The lease of a job ends: what was charged in advance becomes what it really took.
local function settle(job)
  count(load_key(job.level), job.owner, -job.cost)
  local produced = job.n - job.base
  local took = produced > 0 and units(job, produced + job.prompt_tokens) or 0
  charge(job.level, job.owner, took - job.cost)
end

-- The job ends in this state. One that no worker ever had gives back all its tokens, and its request too if nobody began it in time: a
-- caller who cancels has asked all the same.
local function settle_rates(job, state)
  local took = job.attempt > 0 and job.n + job.prompt_tokens or 0
  local request = job.attempt == 0 and state == 'expired' and 1 or 0
  for _, rate in ipairs(cjson.decode(job.rates)) do pour(rate, look_into(rate), request, job.charged - took) end
end

-- ---------------------------------------------------------------------------------------- pace (pace.lua reads it)

local rate -- as the finishes of this call leave it

local function count_finish(job)
  if not rate then
    local before = call('HMGET', t .. ':rate', 'value', 'gaps', 'run', 'at')
    local gap = now - (before[4] or now)
    local fade = math.exp(-gap / RATE_MS)
    rate = {value = (before[1] or 0) * fade, gaps = (before[2] or 0) * fade + gap * gap, run = (before[3] or 0) * fade}
  end
  rate.value, rate.run = rate.value + 1, rate.run + now - job.started
end

-- Jobs are leased.
local function count_lease()
  local at = rate and now or tonumber(call('HGET', t .. ':rate', 'at') or 0)
  if now - at > 10 * RATE_MS then
    call('DEL', t .. ':rate')
    call('HSET', t .. ':rate', 'since', now, 'at', now)
  end
end

at_end[#at_end + 1] = function()
  if rate then call('HSET', t .. ':rate', 'value', rate.value, 'gaps', rate.gaps, 'run', rate.run, 'at', now) end
end

-- ---------------------------------------------------------------------------------------- waiting, running, ended

-- A waiting job is leased.
local function dequeue(job)
  count_waiting(job, -1)
  step_out(job)
end

-- A job of a key with a bound ends.
local function leave_key(job)
  if job.state == 'waiting' and call('ZREM', parked_key(job.key), job.id) == 1 then
    call('DECR', t .. ':parked')
  else
    if job.state == 'waiting' then step_out(job) end
    call('HINCRBY', cap_key(job.key), 'admitted', -1)
  end
  admit(job.key)
end

-- How often an operator brought the job back from the dead, and the tokens of its answer and prompt that its earlier ends have accounted for.
local function lives(job)
  local times, n, prompt = string.match(job.retried or '0 0 0', '^(%d+) (%d+) (%d+)$')
  return tonumber(times), tonumber(n), tonumber(prompt)
end

-- The job ends, from any state: its terminal entry, its place or slot, its charge, its row for the ledger. detail: error as JSON.
local function finish(job, state, word, detail)
  if job.state == 'waiting' then
    count_waiting(job, -1)
    if job.key == '' then step_out(job) end
    call('ZREM', t .. ':deadlines', job.id) -- a lease takes it away too
  else
    call('HDEL', held_key(job.session), job.id)
    settle(job)
    count_finish(job)
  end
  if job.key ~= '' then leave_key(job) end
  if job.rates then settle_rates(job, state) end
  call('HSET', job_key(job.id), 'state', state, 'finish', word, 'error', detail or '', 'ended', now)
  local times, paid, paid_prompt = lives(job)
  call('XADD', log_key(job.id), job.n .. '-' .. 2 * times + 1, 'end', state)
  call('PEXPIRE', job_key(job.id), job.ttl)
  call('PEXPIRE', log_key(job.id), job.ttl)
  if job.idem ~= '' then call('PEXPIRE', job.idem, job.ttl) end
  local row = times > 0 and job.id .. '~' .. times or job.id
  call('XADD', t .. ':usage', '*', 'job', row, 'owner', job.owner, 'title', job.title, 'state', state, 'finish', word,
    'error', detail and cjson.decode(detail).code or '', 'prompt_tokens', math.max(0, job.prompt_tokens - paid_prompt), 'n', math.max(0, job.n - paid),
    'attempt', job.attempt, 'created', job.created, 'started', job.started or '', 'first', job.first or '', 'ended', now)
  count(t .. ':totals', state, 1)
  job.state = state
  if state == 'done' then tell_done(job, word) else tell(job.id) end
end

-- A leased job goes back to the place it had.
local function requeue(job)
  if job.text then start_anew(job) end
  call('HDEL', held_key(job.session), job.id)
  settle(job)
  call('HSET', job_key(job.id), 'state', 'waiting')
  job.state = 'waiting'
  count_waiting(job, 1)
  line_up(job)
  if job.key ~= '' then admit(job.key) end
  tell(job.id)
end

-- A worker died with the job: back to its place, or, with the third death, given up and kept for so long. Returns whether it was given up.
local function survive(job, worker, max_dead_letters, keep_ms)
  if job.deaths < SUSPECT_DEATHS then
    job.deaths = call('HINCRBY', job_key(job.id), 'deaths', 1)
    requeue(job)
    return false
  end
  local deaths = call('HINCRBY', job_key(job.id), 'deaths', 1)
  local message = deaths .. ' workers died while they ran this job, the last was ' .. worker .. '; it is tried again only when an operator says so'
  job.ttl = keep_ms
  finish(job, 'dead', 'error', cjson.encode({message = message, type = 'server_error', code = 'workers_died'}))
  call('XADD', t .. ':dead', 'MAXLEN', max_dead_letters, '*', 'job', job.id, 'owner', job.owner, 'reason', message,
    'worker', worker, 'at', now)
  return true
end

-- A session ends. lost: called with each job it held.
local function end_session(session, lost)
  local held = call('HKEYS', held_key(session))
  for _, id in ipairs(held) do lost(load_job(id)) end
  local key = call('HGET', session_key(session), 'key')
  if key then call('SREM', t .. ':key:' .. key, session) end
  call('DEL', held_key(session), session_key(session))
  call('ZREM', t .. ':sessions', session)
  return #held
end
