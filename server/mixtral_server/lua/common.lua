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

-- The job's record without its request, or nil. ttl and created stay text, as most that is read of a job is written elsewhere as it is.
local function load_job(id)
  local v = call('HMGET', job_key(id), 'state', 'owner', 'prio', 'weight', 'due', 'estimate', 'deaths', 'n', 'base', 'cost', 'level',
    'session', 'key', 'most', 'idem', 'ttl', 'prompt_tokens', 'title', 'created', 'started', 'first', 'attempt', 'rates', 'charged',
    'eta', 'eta_p90', 'retried', 'native', 'text', 'dropped', 'bytes', 'max')
  if not v[1] then return nil end
  return {
    id = id, state = v[1], owner = v[2], prio = v[3], weight = tonumber(v[4]), due = tonumber(v[5]), estimate = tonumber(v[6]),
    deaths = tonumber(v[7]), n = tonumber(v[8]), base = tonumber(v[9]) or 0, cost = tonumber(v[10]) or 0, level = tonumber(v[11]) or 0,
    session = v[12], key = v[13], most = v[14], idem = v[15], ttl = v[16], prompt_tokens = tonumber(v[17]) or 0, title = v[18],
    created = v[19], started = v[20], first = v[21], attempt = tonumber(v[22]), rates = v[23], charged = tonumber(v[24]) or 0,
    eta = v[25], eta_p90 = v[26], retried = v[27], native = v[28], text = v[29], dropped = tonumber(v[30]) or 0,
    bytes = tonumber(v[31]), max = tonumber(v[32]),
  }
end

-- ---------------------------------------------------------------------------------------- what is written at the end

-- A call that moves many jobs changes the same few numbers for each: they are reckoned here, and written once. Who reads one of them from
-- Redis writes them first.
local at_end = {} -- functions that write what has changed
local counts = {} -- key → field → how much more

local function count(key, field, by)
  local of_key = counts[key]
  if of_key then
    of_key[field] = (of_key[field] or 0) + by
  else
    counts[key] = {[field] = by}
  end
end

-- A count that falls to nothing is forgotten.
local function write_counts()
  for key, of_key in pairs(counts) do
    for field, by in pairs(of_key) do
      if by ~= 0 and call('HINCRBY', key, field, by) <= 0 then call('HDEL', key, field) end
    end
  end
  counts = {}
end

-- ---------------------------------------------------------------------------------------- news for followers and parked turns

-- News are JSON: ["job",first offset,ids,texts] = appended, with logprobs where they are asked for; ["job"] = look at its log;
-- ["job",0,finish,tokens,prompt tokens,messages dropped,created,started,first token,ended] = done. Before them stands who asked: a server
-- process has its own news by its answer.
local asker, is_heard = '', true -- is_heard: by any other process
local appends, news = {}, {}
local has_work = false -- a job can be claimed that could not be before

local function tell(id) news[#news + 1] = '["' .. id .. '"]' end

local function tell_done(job, word)
  local facts = {
    0, '"' .. word .. '"', job.n, job.prompt_tokens, job.dropped, job.created, job.started or 'null', job.first or 'null', now,
  }
  news[#news + 1] = '["' .. job.id .. '",' .. table.concat(facts, ',') .. ']'
end

-- Whoever asks for work and finds none waits for ':wake', if it has no work of its own. Only the first job that comes then says so: who is
-- woken asks again, and finds the others. A worker that is not waiting meets them with its next turn.
local function wait_for_work() call('SET', t .. ':idle', 1) end

-- The last step of every script that moves a job: numbers are written, news are told.
local function conclude()
  for _, write in ipairs(at_end) do write() end
  write_counts()
  if is_heard and #appends + #news > 0 then
    local comma = #appends > 0 and #news > 0 and ',' or ''
    call('PUBLISH', t .. ':live', '["' .. asker .. '",' .. table.concat(appends, ',') .. comma .. table.concat(news, ',') .. ']')
  end
  if has_work and call('DEL', t .. ':idle') == 1 then call('PUBLISH', t .. ':wake', '1') end
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
