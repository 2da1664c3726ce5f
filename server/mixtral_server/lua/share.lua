-- Where users stand: their level by priority and waiting time, and within a level their share.

local MAX_SPENT = 10000 -- users who left a level whose debts are remembered
local LAST_LEVEL = 9

local function ring_key(level) return t .. ':ring:' .. level end
local function spent_key(level) return t .. ':spent:' .. level end
local function load_key(level) return t .. ':load:' .. level end
-- A key with a bound on its running jobs: the bound and how many jobs it has admitted, and those it has not.
local function cap_key(key) return t .. ':cap:' .. key end
local function parked_key(key) return t .. ':parked:' .. key end

-- Queue time is Redis's clock in microseconds less the gaps that nobody watched; it never runs back. A job is due at its arrival plus
-- its priority times ':clock' ageing: so long a wait lifts it by one priority. How many such spans it still is from being due is its
-- level; 0 is served first. Within a user, who is due first is served first.

local clock

local function read_clock()
  if not clock then
    local values = call('HMGET', t .. ':clock', 'away', 'last', 'ageing')
    clock = {last = tonumber(values[2]) or 0, ageing = tonumber(values[3]) or 1}
    clock.now = math.max(now_us - (tonumber(values[1]) or 0), clock.last)
  end
  return clock
end

local function level_of(due)
  local early = due - read_clock().now
  if early <= 0 then return 0 end
  return math.min(LAST_LEVEL, math.ceil(early / clock.ageing))
end

-- ---------------------------------------------------------------------------------------- fair share
-- A user stands at the level of their first job, with all of their jobs. Per level: ':ring' orders the users who stand there by
-- virtual time, the units they were served; the least served is next. A user who comes joins at the time of the user served last
-- (':vclock'), or of the least served if that is lower: time spent away earns nothing. Who leaves is remembered in ':spent', so that
-- coming back earns nothing either. While nobody stands there is nothing to share, and all of it is forgotten but for ':load', the units
-- of running jobs, which are charged in advance by estimate and corrected at the end.

-- What this call has read and changed of it, written at its end or before a ring is read: where users stand, false for who stands nowhere;
-- those of them whose time has moved; of levels the time of the user served last.
local standings, moved, served = {}, {}, {}

local function write_moves()
  for user, place in pairs(moved) do call('ZADD', ring_key(place.level), place.at, user) end
  moved = {}
end

at_end[#at_end + 1] = function()
  write_moves()
  for level, at in pairs(served) do call('HSET', t .. ':vclock', level, at) end
end

local function head_of_ring(level)
  if next(moved) then write_moves() end
  local head = call('ZRANGE', ring_key(level), 0, 0, 'WITHSCORES')
  return head[1], tonumber(head[2])
end

-- Where a user's virtual time begins who comes to that level now, and the least it may fall to.
local function joining(level, user)
  local _, least = head_of_ring(level)
  local base = math.min(served[level] or tonumber(call('HGET', t .. ':vclock', level) or 0), least or 0)
  write_counts() -- of ':load'
  local at = call('ZSCORE', spent_key(level), user) or base + (call('HGET', load_key(level), user) or 0)
  return math.max(base, tonumber(at)), base
end

local function join_ring(level, user)
  local at, base = joining(level, user)
  call('ZADD', ring_key(level), at, user)
  call('ZREM', spent_key(level), user)
  call('HSET', t .. ':stands', user, level .. ' ' .. base)
  standings[user] = {level = level, floor = base, at = at}
end

-- Level at which a user stands and the least that their virtual time may fall to; false for who stands nowhere.
local function stand(user)
  if standings[user] == nil then
    local level, floor = string.match(call('HGET', t .. ':stands', user) or '', '^(%d+) (.+)$')
    standings[user] = level and {level = tonumber(level), floor = tonumber(floor)} or false
  end
  return standings[user]
end

local function level_of_user(user) return stand(user) and stand(user).level end

-- The virtual time of a user who stands at a level.
local function time_of(user)
  local place = stand(user)
  place.at = place.at or tonumber(call('ZSCORE', ring_key(place.level), user))
  return place.at
end

local function leave_ring(user)
  local level, at = stand(user).level, time_of(user)
  standings[user], moved[user] = false, nil
  call('ZREM', ring_key(level), user)
  call('HDEL', t .. ':stands', user)
  if call('EXISTS', ring_key(level)) == 0 then
    call('DEL', spent_key(level))
    call('HDEL', t .. ':vclock', level)
    served[level] = nil
  else
    call('ZADD', spent_key(level), at, user)
    call('ZREMRANGEBYRANK', spent_key(level), 0, -MAX_SPENT - 1) -- the least of them stand where they would join anew
  end
end

-- After any change of a user's line, and when ':lifts' says that its first job has waited long enough for the next level.
local function stand_by_first(user)
  local first = call('ZRANGE', t .. ':wait:' .. user, 0, 0, 'WITHSCORES')
  local before, level = level_of_user(user), first[1] and level_of(tonumber(first[2]))
  if level ~= before then
    if before then leave_ring(user) end
    if level then join_ring(level, user) end
  end
  if level and level > 0 then
    call('ZADD', t .. ':lifts', first[2] - (level - 1) * clock.ageing, user)
  elseif before and before > 0 then
    call('ZREM', t .. ':lifts', user)
  end
end

local function units(job, tokens) return math.ceil(tokens / job.weight) end

local function estimated_units(job) return units(job, math.max(1, job.estimate - job.n)) end
