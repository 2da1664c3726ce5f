-- A worker logs out: its jobs go back to their places. ARGV: session, key. → how many; 0 when there is no such session.
if call('HGET', session_key(ARGV[1]), 'key') ~= ARGV[2] then return 0 end
use_reserve()
local released = end_session(ARGV[1], requeue)
conclude()
return released
