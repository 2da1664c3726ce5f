-- Where a waiting job stands: how many jobs are leased before it if each takes as long as this one.
-- Exact while all jobs cost the same and nobody comes; users beyond the first MAX_USERS ahead count as one job each.

local MAX_USERS = 300

-- How many of a user's jobs, served at `at`, at + cost, …, come before `mark`; a tie goes to the smaller name, as in a sorted set.
local function served_before(at, cost, mark, wins_tie, waiting)
  local turns = (mark - at) / cost
  local count = math.ceil(turns)
  if wins_tie and count == turns then count = count + 1 end
  return math.min(count, waiting)
end

local function place_of(job)
  if job.state ~= 'waiting' then return false end
  local ahead = 0
  for prio, count in pairs(table_of(call('HGETALL', t .. ':waiting'))) do
    if tonumber(prio) < tonumber(job.prio) then ahead = ahead + count end
  end
  local rank = call('ZRANK', wait_key(job), job.id)
  if job.deaths >= SUSPECT_DEATHS then return ahead + rank + 1 end
  ahead = ahead + call('ZCARD', t .. ':suspects:' .. job.prio) + rank

  local ring, cost = ring_key(job.prio), estimated_units(job)
  local mark = call('ZSCORE', ring, job.owner) + rank * cost
  local users = call('ZRANGEBYSCORE', ring, '-inf', mark, 'WITHSCORES', 'LIMIT', 0, MAX_USERS)
  for i = 1, #users, 2 do
    local user = users[i]
    if user ~= job.owner then
      local waiting = call('ZCARD', t .. ':wait:' .. job.prio .. ':' .. user)
      ahead = ahead + served_before(tonumber(users[i + 1]), cost, mark, user < job.owner, waiting)
    end
  end
  if #users == 2 * MAX_USERS then ahead = ahead + call('ZCOUNT', ring, '-inf', mark) - MAX_USERS end
  return ahead + 1
end

-- {position, rate as text or ''} of a waiting job, else {false, ''}.
local function place_reply(job)
  local position, rate = place_of(job), finish_rate()
  return {position, rate and string.format('%.9f', rate) or ''}
end
