-- A worker did what no honest one does. Its offences are counted with its session, which is cut when it has too many; so long without one, and
-- the count begins anew. ARGV: session, key, offences seen, most, milliseconds after which they are forgotten, then (job, attempt) of frames
-- that were dropped: one of a job that the session never had is an offence, one of a job that it lost meanwhile is none.
-- → {offences now counted, whether a frame was of a job it never had, whether it was cut, jobs given back}, or nothing without such a session.
local session = ARGV[1]
local login = table_of(call('HGETALL', session_key(session)))
if login.key ~= ARGV[2] then return false end
local stranger = 0
for i = 6, #ARGV, 2 do
  local job, attempt = load_job(ARGV[i]), tonumber(ARGV[i + 1])
  if not job or attempt > job.attempt or (attempt == job.attempt and job.session ~= session) then stranger = 1 end
end
local seen = ARGV[3] + stranger
if seen == 0 then return {0, 0, 0, 0} end
use_reserve()
local before = now - (login.offended or 0) < tonumber(ARGV[5]) and login.offences or 0
local count = before + seen
if count < tonumber(ARGV[4]) then
  call('HSET', session_key(session), 'offences', count, 'offended', now)
  return {count, stranger, 0, 0}
end
local released = end_session(session, requeue)
conclude()
return {count, stranger, 1, released}
