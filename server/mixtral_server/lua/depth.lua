-- Numbers of the endpoint. → {waiting by priority, users waiting, running, sessions, unsaved rows, dead letters, finish rate, totals}
local running = 0
local sessions = call('ZRANGE', t .. ':sessions', 0, -1)
for _, session in ipairs(sessions) do running = running + call('HLEN', held_key(session)) end
local rate = finish_rate()
return {
  call('HGETALL', t .. ':waiting'), call('HLEN', t .. ':waiting_of'), running, #sessions, call('XLEN', t .. ':usage'),
  call('XLEN', t .. ':dead'), rate and string.format('%.9f', rate) or '', call('HGETALL', t .. ':totals'),
}
