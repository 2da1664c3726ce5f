-- Which waiting job an AIME worker gets next: the order of claim.lua without the jobs that only native workers can serve. Those stand in
-- their user's line like any other, and in ':native:<user>' beside it.

-- Id and level of a line's first job that any worker may have, or nothing.
local function first_open(line, natives)
  local closed = call('ZCARD', natives)
  if closed == 0 then
    local first = call('ZRANGE', line, 0, 0, 'WITHSCORES')
    return first[1], first[1] and level_of(tonumber(first[2]))
  end
  if closed == call('ZCARD', line) then return nil end
  for at = 0, closed do
    local job = call('ZRANGE', line, at, at, 'WITHSCORES')
    if job[1] and not call('ZSCORE', natives, job[1]) then return job[1], level_of(tonumber(job[2])) end
  end
  return nil
end

local function has_open()
  write_counts()
  local lined = -(call('GET', t .. ':parked') or 0)
  for _, jobs in ipairs(call('HVALS', t .. ':waiting')) do lined = lined + jobs end
  return lined > tonumber(call('HGET', t .. ':closed', 'jobs') or 0)
end

-- As next_in_line in claim.lua. A user whose first open job is of a worse level than the user's place waits for that level, and goes first there.
local function next_open(may_be_suspect)
  if not has_open() then return nil end
  local suspect, level_of_suspect
  if may_be_suspect then suspect, level_of_suspect = first_open(t .. ':suspects', t .. ':native_suspects') end
  local later = {}
  for level = 0, LAST_LEVEL do
    if level == level_of_suspect then return suspect, level end
    local _, least = head_of_ring(level)
    if later[level] then return later[level][1], level, least end
    local at, users = 0, nil
    repeat
      users = call('ZRANGE', ring_key(level), at, at + 99)
      for _, user in ipairs(users) do
        local id, own = first_open(t .. ':wait:' .. user, t .. ':native:' .. user)
        if id and own <= level then return id, level, least end
        if id and not later[own] then later[own] = {id, level} end
      end
      at = at + 100
    until #users < 100
  end
  return nil
end
