-- A worker logs in. ARGV: session, key, lease, most sessions of the key, then names and values of what it says of itself.
-- → 1, or 0 when the key has its fill of sessions.
local session, key = ARGV[1], ARGV[2]
local of_key = t .. ':key:' .. key
if call('SISMEMBER', of_key, session) == 1 then return 1 end
if call('SCARD', of_key) >= tonumber(ARGV[4]) then return 0 end
move_times()
call('SADD', of_key, session)
call('ZADD', t .. ':sessions', now + ARGV[3], session)
call('HSET', session_key(session), 'key', key, 'opened', now, 'turn', 0, 'room', 0, unpack(ARGV, 5))
return 1
