-- The workers logged in. → for each {session, milliseconds of lease left, jobs held, names and values of its record}
local workers = {}
for i, session in ipairs(call('ZRANGE', t .. ':sessions', 0, -1)) do
  local lease_end = tonumber(call('ZSCORE', t .. ':sessions', session))
  workers[i] = {session, lease_end - now, call('HLEN', held_key(session)), call('HGETALL', session_key(session))}
end
return workers
