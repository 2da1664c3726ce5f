-- Stands before every script: names of keys, the clock, a job's record, news for others.
-- KEYS[1] is '{endpoint.0}'. Every other key begins with it, so that all of them live in one cluster slot.
-- Times are milliseconds of Redis's clock. Fair share counts in whole units: tokens / weight.

local t = KEYS[1]
local call = redis.call
local TERMINAL = {done = true, failed = true, cancelled = true, expired = true, dead = true}
local SUSPECT_DEATHS = 2 -- a job whose workers died this often runs beside no other such job, and dies with the next worker
local RATE_MS = 60000 -- over which the finish rate is measured

local time = call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
local now = math.floor(now_us / 1000)

local function job_key(id) return t .. ':job:' .. id end
local function log_key(id) return t .. ':log:' .. id end
local function held_key(session) return t .. ':held:' .. session end
local function session_key(session) return t .. ':session:' .. session end
-- Flat array of names and values → table.
local function table_of(flat)
  local map = {}
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

local JOB_FIELDS = {
  'state', 'owner', 'prio', 'weight', 'due', 'estimate', 'deaths', 'n', 'base', 'cost', 'level', 'session', 'key', 'most', 'idem',
  'ttl', 'prompt_tokens', 'title', 'created', 'started', 'first', 'attempt', 'rates', 'charged', 'eta', 'eta_p90', 'retried',
  'native', 'text', 'dropped',
}
local JOB_NUMBERS = {
  'weight', 'due', 'estimate', 'deaths', 'n', 'base', 'cost', 'level', 'ttl', 'prompt_tokens', 'created', 'attempt', 'charged',
  'dropped',
}

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

-- News are JSON: ["job",first offset,ids,texts] = appended, with logprobs where they are asked for; ["job"] = look at its log;
-- ["job",0,finish,tokens,prompt tokens,messages dropped,created,started,first token,ended] = done. Before them stands who asked: a server
-- process has its own news by its answer.
local asker, is_heard = '', true -- is_heard: by any other process
local appends, news = {}, {}
local has_work = false

local function tell(id) news[#news + 1] = '["' .. id .. '"]' end

local function tell_done(job, word)
  local facts = {
    0, '"' .. word .. '"', job.n, job.prompt_tokens, job.dropped, job.created, job.started or 'null', job.first or 'null', now,
  }
  news[#news + 1] = '["' .. job.id .. '",' .. table.concat(facts, ',') .. ']'
end

local function publish()
  if is_heard and #appends + #news > 0 then
    local comma = #appends > 0 and #news > 0 and ',' or ''
    call('PUBLISH', t .. ':live', '["' .. asker .. '",' .. table.concat(appends, ',') .. comma .. table.concat(news, ',') .. ']')
  end
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
  call('HINCRBY', t .. ':clock', 'away', gap * 1000)
  call('SET', t .. ':tick', now)
  return gap
end
