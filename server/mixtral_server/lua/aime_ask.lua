-- An AIME worker asks for jobs: its lease is renewed, what it lost goes back, and up to room jobs are leased.
-- ARGV: session, key, lease, poll, whether the poll begins, room, linger of whole batches, longest silence about a job, most dead letters kept,
--       how long their jobs are
-- → {'unknown'}, {'stale'} or {'ok', jobs: {id, attempt, request, created} of each, ms after which to come again for a batch that is
--    filling, now, how many it had lost}
local session, room = ARGV[1], tonumber(ARGV[6])
local login = table_of(call('HGETALL', session_key(session)))
if login.key ~= ARGV[2] then return {'unknown'} end
if ARGV[5] == '1' then
  login.poll = ARGV[4]
elseif login.poll ~= ARGV[4] then
  return {'stale'} -- the worker asks anew by another connection: nobody reads this answer
end

use_reserve()
move_times()
call('ZADD', t .. ':sessions', now + ARGV[3], session)

-- What a worker has, and what it asks for, is as much as it ever asked for: of what it holds beyond that it knows nothing, as after a
-- restart. The jobs that it was silent about for the longest are those. One that hangs on a job gets no others until it says something.
local most = math.max(room, tonumber(login.max_slots))
local queue_now = read_clock().now
local held = table_of(call('HGETALL', held_key(session)))
local jobs = {}
for id in pairs(held) do jobs[#jobs + 1] = {id = id, heard = tonumber(call('HGET', job_key(id), 'heard') or 0)} end
table.sort(jobs, function(a, b)
  if a.heard ~= b.heard then return a.heard < b.heard end
  return a.id < b.id
end)
local lost = 0
for i, one in ipairs(jobs) do
  local is_mute = one.heard + ARGV[8] * 1000 <= queue_now
  if is_mute then
    login.mute = '1'
    call('HSET', session_key(session), 'mute', 1)
  end
  if is_mute or i <= #jobs + room - most then
    survive(load_job(one.id), login.name, ARGV[9], ARGV[10])
    held[one.id], lost = nil, lost + 1
  end
end

local leased, fill = {}, 0
if not login.drain and not login.mute then
  fill = fill_ms(room, ARGV[7])
  leased = claim(session, fill > 0 and 0 or room, not held[login.suspect or ''], next_open)
end
for _, job in ipairs(leased) do call('HSET', job_key(job.id), 'heard', queue_now, 'text', redis.sha1hex('')) end
call('HSET', session_key(session), 'poll', login.poll, 'max_slots', most, 'room', room - #leased)
if #leased == 0 then wait_for_work() end -- before conclude(): what this call gave back wakes it too
conclude()

local replies = {}
for i, job in ipairs(leased) do replies[i] = {job.id, job.attempt, job.spec, job.created} end
return {'ok', replies, fill, now, lost}
