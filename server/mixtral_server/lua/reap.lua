-- What time alone changes: sessions lapse, queue-time limits pass, users rise a level. Bounded per call.
-- ARGV: most dead letters kept, how long their jobs are. → {lapsed, requeued, dead, expired, gap in ms, whether more is left}
local MAX_SESSIONS, MAX_EXPIRED, MAX_LIFTED = 50, 500, 500

local is_first = call('EXISTS', t .. ':tick') == 0
use_reserve()
local gap = move_times()
call('SET', t .. ':tick', now)
if is_first then return {0, 0, 0, 0, 0, 0} end -- how long nobody watched is unknown: judge from the next call on

local lapsed = call('ZRANGEBYSCORE', t .. ':sessions', '-inf', now, 'LIMIT', 0, MAX_SESSIONS)
local requeued, dead = 0, 0
for _, session in ipairs(lapsed) do
  local worker = call('HGET', session_key(session), 'name') or session
  end_session(session, function(job)
    if survive(job, worker, ARGV[1], ARGV[2]) then dead = dead + 1 else requeued = requeued + 1 end
  end)
end

local expired = call('ZRANGEBYSCORE', t .. ':deadlines', '-inf', now, 'LIMIT', 0, MAX_EXPIRED)
for _, id in ipairs(expired) do finish(load_job(id), 'expired', 'expired') end

local lifted = call('ZRANGEBYSCORE', t .. ':lifts', '-inf', read_clock().now, 'LIMIT', 0, MAX_LIFTED)
for _, user in ipairs(lifted) do stand_by_first(user) end

conclude()
local more = #lapsed == MAX_SESSIONS or #expired == MAX_EXPIRED or #lifted == MAX_LIFTED
return {#lapsed, requeued, dead, #expired, gap, more and 1 or 0}
