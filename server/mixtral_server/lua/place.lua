-- Where a waiting job stands: how many jobs are leased before it if each takes as long as this one, and when its turn comes.
-- Exact while all jobs cost the same, nobody comes, nothing ages and no key's bound holds jobs back; users beyond the first MAX_USERS
-- ahead count as one job each.

local MAX_USERS = 300

-- How many of a user's jobs, served at `at`, at + cost, …, come before `mark`; a tie goes to the smaller name, as in a sorted set.
local function served_before(at, cost, mark, wins_tie, waiting)
  local turns = (mark - at) / cost
  local count = math.ceil(turns)
  if wins_tie and count == turns then count = count + 1 end
  return math.max(0, math.min(count, waiting))
end

-- A bound of ZCOUNT: a time in µs has more digits than Lua writes by itself.
local function score(prefix, time) return prefix .. string.format('%.0f', time) end

-- How many jobs of a line are due in these bounds; all of them where there are none.
local function jobs_of(line, from, to)
  if not from then return call('ZCARD', line) end
  return call('ZCOUNT', line, from, to)
end

-- How many jobs each of these users, at most MAX_USERS, has in line in these bounds. One call for all where none of their jobs is parked or a
-- suspect, so that those in line are all that wait.
local function jobs_in_lines(users, suspects, from, to)
  if #users > 0 and not from and suspects == 0 and tonumber(call('GET', t .. ':parked') or 0) == 0 then
    return call('HMGET', t .. ':waiting_of', unpack(users))
  end
  local counts = {}
  for i, user in ipairs(users) do counts[i] = jobs_of(t .. ':wait:' .. user, from, to) end
  return counts
end

-- Users at better levels who come to this one with jobs in these bounds when their better ones are gone.
local function ahead_of_those_to_come(job, level, cost, mark, from, to)
  local ahead, left = 0, MAX_USERS
  for better = 0, level - 1 do
    for _, user in ipairs(left > 0 and call('ZRANGE', ring_key(better), 0, left - 1) or {}) do
      left = left - 1
      local waiting = user ~= job.owner and jobs_of(t .. ':wait:' .. user, from, to) or 0
      if waiting > 0 then ahead = ahead + served_before(joining(level, user), cost, mark, user < job.owner, waiting) end
    end
  end
  return ahead
end

-- How many jobs are served before this one, and of a parked job how many of its key's are parked before it.
local function ahead_of(job)
  write_counts()
  local level, ahead, from, to = level_of(job.due), 0, nil, nil
  if call('EXISTS', t .. ':lower') == 1 then -- else all that waits is of level 0
    local here = clock.now + level * clock.ageing
    local above = score('', here - clock.ageing)
    from, to = level > 0 and '(' .. above or '-inf', level < LAST_LEVEL and score('', here) or '+inf'
    if level > 0 then ahead = (call('HGET', t .. ':waiting', 0) or 0) + call('ZCOUNT', t .. ':lower', '-inf', above) end
  end
  local first, before = from or '-inf', score('(', job.due)
  if job.deaths >= SUSPECT_DEATHS then return ahead + call('ZCOUNT', t .. ':suspects', first, before) end
  local suspects = jobs_of(t .. ':suspects', from, to)
  ahead = ahead + suspects

  local rank, parked = call('ZCOUNT', t .. ':wait:' .. job.owner, first, before), nil
  if job.key ~= '' then
    parked = call('ZRANK', parked_key(job.key), job.id)
    if parked then rank = rank + call('ZCOUNT', parked_key(job.key), first, before) end
  end
  ahead = ahead + rank

  local ring, cost = ring_key(level), estimated_units(job)
  local mark = (call('ZSCORE', ring, job.owner) or joining(level, job.owner)) + rank * cost
  local stands, users, marks = call('ZRANGEBYSCORE', ring, '-inf', mark, 'WITHSCORES', 'LIMIT', 0, MAX_USERS), {}, {}
  for i = 1, #stands, 2 do
    if stands[i] ~= job.owner then users[#users + 1], marks[#marks + 1] = stands[i], tonumber(stands[i + 1]) end
  end
  local waiting = jobs_in_lines(users, suspects, from, to)
  for i, user in ipairs(users) do
    ahead = ahead + served_before(marks[i], cost, mark, user < job.owner, tonumber(waiting[i]) or 0)
  end
  if #stands == 2 * MAX_USERS then ahead = ahead + call('ZCOUNT', ring, '-inf', mark) - MAX_USERS end
  return ahead + ahead_of_those_to_come(job, level, cost, mark, from, to), parked
end

-- Median and 90th percentile, ms, of the time that `steps` steps of this mean take. Steps vary by `variation` (squared coefficient), and
-- the mean is known from `samples` of them; the sum is taken as lognormal.
local function quantiles(steps, mean, variation, samples)
  local spread = math.log(1 + variation * (1 / steps + 1 / math.max(1, samples)))
  local median = steps * mean * math.exp(-spread / 2)
  return median, median * math.exp(1.2816 * math.sqrt(spread))
end

-- {position, median and 90th percentile of what it still waits, ms; false where nothing is measured} of a waiting job, else {false, …}.
local function place_reply(job)
  if job.state ~= 'waiting' then return {false, false, false} end
  local ahead, parked = ahead_of(job)
  local rate, samples, variation, run = pace()
  if not rate then return {ahead + 1, false, false} end
  local p50, p90 = quantiles(ahead + 1, 1 / rate, variation, samples)
  if parked then -- its key's jobs go through `most` slots, one run after another; runs are taken to vary as much as they last
    local own50, own90 = quantiles(parked + 1, run / call('HGET', cap_key(job.key), 'most'), 1, samples)
    p50, p90 = math.max(p50, own50), math.max(p90, own90)
  end
  return {ahead + 1, math.floor(p50 + 0.5), math.floor(p90 + 0.5)}
end
