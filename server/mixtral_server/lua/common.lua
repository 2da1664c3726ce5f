-- Stands before every script: names of keys, the clock, and the steps of a job's life that several scripts take.
-- KEYS[1] is '{endpoint.0}'. Every other key begins with it, so that all of them live in one cluster slot.
-- Times are milliseconds of Redis's clock. Fair share counts in whole units: tokens / weight.

local t = KEYS[1]
local call = redis.call
local TERMINAL = {done = true, failed = true, cancelled = true, expired = true, dead = true}
local SUSPECT_DEATHS = 2 -- a job whose workers died this often runs beside no other such job, and dies with the next worker
local RATE_MS = 60000 -- over which the finish rate is measured
local MAX_SPENT = 10000 -- users without waiting jobs whose debts are remembered

local time = call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local function job_key(id) return t .. ':job:' .. id end
local function log_key(id) return t .. ':log:' .. id end
local function held_key(session) return t .. ':held:' .. session end
local function session_key(session) return t .. ':session:' .. session end
local function ring_key(prio) return t .. ':ring:' .. prio end
local function spent_key(prio) return t .. ':spent:' .. prio end
local function floor_key(prio) return t .. ':floor:' .. prio end
local function load_key(prio) return t .. ':load:' .. prio end

local function wait_key(job)
  if job.deaths >= SUSPECT_DEATHS then return t .. ':suspects:' .. job.prio end
  return t .. ':wait:' .. job.prio .. ':' .. job.owner
end

-- Flat array of names and values → table.
local function table_of(flat)
  local map = {}
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

local JOB_FIELDS = {
  'state', 'owner', 'prio', 'weight', 'arrival', 'estimate', 'deaths', 'n', 'base', 'cost', 'session', 'idem', 'ttl',
  'prompt_tokens', 'title', 'created', 'started', 'first', 'attempt', 'rates', 'charged', 'retried',
}
local JOB_NUMBERS = {'weight', 'arrival', 'estimate', 'deaths', 'n', 'base', 'cost', 'ttl', 'prompt_tokens', 'attempt', 'charged'}

-- The job's record without its request, or nil.
local function load_job(id)
  local values = call('HMGET', job_key(id), unpack(JOB_FIELDS))
  if not values[1] then return nil end
  local job = {id = id}
  for i, name in ipairs(JOB_FIELDS) do job[name] = values[i] end
  for _, name in ipairs(JOB_NUMBERS) do job[name] = tonumber(job[name]) or 0 end
  return job
end

-- ---------------------------------------------------------------------------------------- news for followers and parked turns

local news = {} -- JSON: ["job"] = look at its log, ["job",first offset,ids,texts] = appended
local has_work = false

local function tell(id) news[#news + 1] = '["' .. id .. '"]' end

local function publish()
  if #news > 0 then call('PUBLISH', t .. ':live', '[' .. table.concat(news, ',') .. ']') end
  if has_work then call('PUBLISH', t .. ':wake', '1') end
end

-- At maxmemory Redis refuses a script whose first write takes memory, and lets every later write pass. Scripts that end or go on
-- with what is queued begin with this write, which takes none: running jobs can finish where new ones are refused.
local function use_reserve() call('PERSIST', t .. ':tick') end

-- ---------------------------------------------------------------------------------------- time that nobody watched

-- Reaping keeps ':tick'. Where the tick is older than 3 s, Redis or every server was away, and where it lies ahead, the clock was
-- set back: every lease and deadline moves by that gap, so that an outage lapses nobody. Every script that writes or compares a
-- time calls this first. Returns the gap.
local function move_times()
  local gap = now - tonumber(call('GET', t .. ':tick') or now)
  if gap >= 0 and gap <= 3000 then return 0 end
  for _, name in ipairs({':sessions', ':deadlines'}) do
    for _, member in ipairs(call('ZRANGE', t .. name, 0, -1)) do call('ZINCRBY', t .. name, gap, member) end
  end
  call('SET', t .. ':tick', now)
  return gap
end

-- ---------------------------------------------------------------------------------------- fair share
-- Per priority: ':ring' orders the users with waiting jobs by virtual time, the units they were served; the least served is next.
-- A user who comes joins at the level of the user served last (':vclock'), or of the least served if that is lower: time spent away
-- earns nothing. Who leaves is remembered in ':spent', so that coming back earns nothing either. While nobody waits there is nothing
-- to share, and all of it is forgotten but for ':load', the units of running jobs, which are charged in advance by estimate and
-- corrected at the end.

local function head_of_ring(prio)
  local head = call('ZRANGE', ring_key(prio), 0, 0, 'WITHSCORES')
  return head[1], tonumber(head[2])
end

local function level(prio)
  local _, least = head_of_ring(prio)
  return math.min(tonumber(call('HGET', t .. ':vclock', prio) or 0), least or 0)
end

local function join_ring(prio, user)
  if call('ZSCORE', ring_key(prio), user) then return end
  local base = level(prio)
  local at = call('ZSCORE', spent_key(prio), user) or base + (call('HGET', load_key(prio), user) or 0)
  call('ZADD', ring_key(prio), math.max(base, at), user)
  call('ZREM', spent_key(prio), user)
  call('HSET', floor_key(prio), user, base)
end

local function leave_ring(prio, user)
  local at = call('ZSCORE', ring_key(prio), user)
  call('ZREM', ring_key(prio), user)
  call('HDEL', floor_key(prio), user)
  if call('EXISTS', ring_key(prio)) == 0 then
    call('DEL', spent_key(prio))
    call('HDEL', t .. ':vclock', prio)
  else
    call('ZADD', spent_key(prio), at, user)
    call('ZREMRANGEBYRANK', spent_key(prio), 0, -MAX_SPENT - 1) -- the least of them stand where they would join anew
  end
end

-- Move a user's virtual time; back no further than where it stood when the user began to wait. One who was not seen since all was
-- forgotten joins with what ':load' says.
local function charge(prio, user, units)
  local at = call('ZSCORE', ring_key(prio), user)
  if at then
    local floor = tonumber(call('HGET', floor_key(prio), user))
    call('ZADD', ring_key(prio), math.max(floor, at + units), user)
  elseif call('ZSCORE', spent_key(prio), user) then
    call('ZINCRBY', spent_key(prio), units, user)
  end
end

local function units(job, tokens) return math.ceil(tokens / job.weight) end

local function estimated_units(job) return units(job, math.max(1, job.estimate - job.n)) end

-- The lease of a job ends: what was charged in advance becomes what it really took.
local function settle(job)
  if call('HINCRBY', load_key(job.prio), job.owner, -job.cost) <= 0 then call('HDEL', load_key(job.prio), job.owner) end
  local produced = job.n - job.base
  local took = produced > 0 and units(job, produced + job.prompt_tokens) or 0
  charge(job.prio, job.owner, took - job.cost)
end

-- ---------------------------------------------------------------------------------------- finish rate

-- Jobs per second that left a slot, an exponential mean over RATE_MS that starts with the first lease after a quiet time; nil when
-- there is nothing to measure.
local function finish_rate()
  local rate = table_of(call('HGETALL', t .. ':rate'))
  if not rate.value then return nil end
  local value = rate.value * math.exp(-(now - rate.at) / RATE_MS)
  if value < 0.05 then return nil end
  return value / (1 - math.exp(-math.max(1000, now - rate.since) / RATE_MS)) / RATE_MS * 1000
end

local function count_lease()
  local at = tonumber(call('HGET', t .. ':rate', 'at') or 0)
  if now - at > 10 * RATE_MS then
    call('DEL', t .. ':rate')
    call('HSET', t .. ':rate', 'since', now, 'at', now)
  end
end

local function count_finish()
  local rate = table_of(call('HGETALL', t .. ':rate'))
  local value = (rate.value or 0) * math.exp(-(now - (rate.at or now)) / RATE_MS) + 1
  call('HSET', t .. ':rate', 'value', value, 'at', now)
end

-- ---------------------------------------------------------------------------------------- rates
-- A rate is JSON: {name, requests a minute, tokens a minute}, 0 for no limit. Its two buckets hold a minute's worth at most and fill
-- evenly; a full one is not stored. A job is charged when it is put, its tokens by estimate, and what it really took is known at its end:
-- the rest goes back, or what it took beyond that becomes a debt.

local BUCKETS = {'requests', 'tokens'}

local function bucket_key(rate) return t .. ':bucket:' .. rate[1] end

-- What the rate's buckets hold now; nothing where there is no limit.
local function look_into(rate)
  local kept, left = call('HMGET', bucket_key(rate), 'requests', 'tokens', 'at'), {}
  for i, name in ipairs(BUCKETS) do
    local size = rate[i + 1]
    if size > 0 then left[name] = math.min(size, (kept[i] or size) + math.max(0, now - (kept[3] or now)) * size / 60000) end
  end
  return left
end

local function pour(rate, left, requests, tokens)
  local fields, full_ms = {'at', now}, 0
  local more = {requests = requests, tokens = tokens}
  for i, name in ipairs(BUCKETS) do
    local size = rate[i + 1]
    if left[name] then
      left[name] = math.min(size, left[name] + more[name])
      full_ms = math.max(full_ms, math.ceil((size - left[name]) * 60000 / size))
      fields[#fields + 1], fields[#fields + 2] = name, string.format('%.6f', left[name])
    end
  end
  call('DEL', bucket_key(rate))
  if full_ms > 0 then
    call('HSET', bucket_key(rate), unpack(fields))
    call('PEXPIRE', bucket_key(rate), full_ms)
  end
end

-- The job ends in this state. One that no worker ever had gives back all its tokens, and its request too if nobody began it in time: a
-- caller who cancels has asked all the same.
local function settle_rates(job, state)
  local took = job.attempt > 0 and job.n + job.prompt_tokens or 0
  local request = job.attempt == 0 and state == 'expired' and 1 or 0
  for _, rate in ipairs(cjson.decode(job.rates)) do pour(rate, look_into(rate), request, job.charged - took) end
end

-- ---------------------------------------------------------------------------------------- a job's life

local function count_waiting(key, field, by)
  if call('HINCRBY', key, field, by) <= 0 then call('HDEL', key, field) end
end

local function enqueue(job)
  call('ZADD', wait_key(job), job.arrival, job.id)
  count_waiting(t .. ':waiting', job.prio, 1)
  count_waiting(t .. ':waiting_of', job.owner, 1)
  if job.deaths < SUSPECT_DEATHS then join_ring(job.prio, job.owner) end
  has_work = true
end

local function dequeue(job)
  call('ZREM', wait_key(job), job.id)
  count_waiting(t .. ':waiting', job.prio, -1)
  count_waiting(t .. ':waiting_of', job.owner, -1)
  if job.deaths < SUSPECT_DEATHS and call('EXISTS', wait_key(job)) == 0 then leave_ring(job.prio, job.owner) end
end

-- How often an operator brought the job back from the dead, and the tokens of its answer and prompt that its earlier ends have accounted for.
local function lives(job)
  local times, n, prompt = string.match(job.retried or '0 0 0', '^(%d+) (%d+) (%d+)$')
  return tonumber(times), tonumber(n), tonumber(prompt)
end

-- The job ends, from any state: its terminal entry, its place or slot, its charge, its row for the ledger. detail: error as JSON.
local function finish(job, state, word, detail)
  if job.state == 'waiting' then
    dequeue(job)
  else
    call('HDEL', held_key(job.session), job.id)
    settle(job)
    count_finish()
  end
  if job.rates then settle_rates(job, state) end
  call('ZREM', t .. ':deadlines', job.id)
  call('HSET', job_key(job.id), 'state', state, 'finish', word, 'error', detail or '', 'ended', now)
  local times, paid, paid_prompt = lives(job)
  call('XADD', log_key(job.id), job.n .. '-' .. 2 * times + 1, 'end', state)
  call('PEXPIRE', job_key(job.id), job.ttl)
  call('PEXPIRE', log_key(job.id), job.ttl)
  if job.idem ~= '' then call('PEXPIRE', job.idem, job.ttl) end
  local row = times > 0 and job.id .. '~' .. times or job.id
  call('XADD', t .. ':usage', '*', 'job', row, 'owner', job.owner, 'title', job.title, 'state', state, 'finish', word,
    'error', detail and cjson.decode(detail).code or '', 'prompt_tokens', math.max(0, job.prompt_tokens - paid_prompt), 'n', job.n - paid,
    'attempt', job.attempt, 'created', job.created, 'started', job.started or '', 'first', job.first or '', 'ended', now)
  call('HINCRBY', t .. ':totals', state, 1)
  job.state = state
  tell(job.id)
end

-- A leased job goes back to the place it had.
local function requeue(job)
  call('HDEL', held_key(job.session), job.id)
  settle(job)
  call('HSET', job_key(job.id), 'state', 'waiting')
  job.state = 'waiting'
  enqueue(job)
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
