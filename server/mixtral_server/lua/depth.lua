-- Numbers of the endpoint.
-- → {waiting by priority, tokens waiting, users waiting, running, sessions, unsaved rows, dead letters, finish rate, totals, ETAs}
local running = 0
local sessions = call('ZRANGE', t .. ':sessions', 0, -1)
for _, session in ipairs(sessions) do running = running + call('HLEN', held_key(session)) end
return {
  call('HGETALL', t .. ':waiting'), call('HGET', t .. ':tokens_of', '') or 0, call('HLEN', t .. ':waiting_of'), running, #sessions,
  call('XLEN', t .. ':usage'), call('XLEN', t .. ':dead'), finish_rate(), call('HGETALL', t .. ':totals'), call('HGETALL', t .. ':eta'),
}
