-- The connection of an AIME worker's poll is gone. Jobs that it would have been answered with go back to their places, and if it holds no
-- others it is logged out. ARGV: session, key, poll, then (job, attempt) of each. → how many went back
local session = ARGV[1]
local login = table_of(call('HGETALL', session_key(session)))
if login.key ~= ARGV[2] then return 0 end
use_reserve()
local returned = 0
for i = 4, #ARGV, 2 do
  if call('HGET', held_key(session), ARGV[i]) == ARGV[i + 1] then
    requeue(load_job(ARGV[i]))
    returned = returned + 1
  end
end
if login.poll == ARGV[3] and call('HLEN', held_key(session)) == 0 then end_session(session, requeue) end
conclude()
return returned
