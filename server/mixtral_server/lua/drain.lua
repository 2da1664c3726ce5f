-- Ask a worker to take no new work. ARGV: session. → 1, or 0 when there is no such session.
if call('EXISTS', session_key(ARGV[1])) == 0 then return 0 end
call('HSET', session_key(ARGV[1]), 'drain', 1)
return 1
