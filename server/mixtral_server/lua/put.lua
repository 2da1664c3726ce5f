-- A job is queued, once, however often this is called with its id.
-- ARGV: id, owner, priority, weight, estimate, max tokens, request, title, ttl, queue timeout or '', idempotency field or '',
--       body hash, most waiting, most waiting of one user, most unsaved rows, rates as JSON or ''
-- → {what the rates' buckets hold: {requests, tokens} of each, then {outcome, id, state, position, finish rate} or
--    {refusal, count, finish rate}; of 'limited' the count is that of the rates before the one that refused}

local id, owner, prio = ARGV[1], ARGV[2], ARGV[3]
local idem = ARGV[11] ~= '' and t .. ':idem:' .. owner .. ':' .. ARGV[11] or ''

local rates, left = ARGV[16] ~= '' and cjson.decode(ARGV[16]) or {}, {}
for i, rate in ipairs(rates) do left[i] = look_into(rate) end

local function with_rates(reply)
  local held = {}
  for i = 1, #rates do held[i] = {tostring(left[i].requests or ''), tostring(left[i].tokens or '')} end
  return {held, reply}
end

local function answer(outcome, job)
  local place = place_reply(job)
  return with_rates({outcome, job.id, job.state, place[1], place[2]})
end

local function refuse(why, count)
  local rate = finish_rate()
  return with_rates({why, count, rate and string.format('%.9f', rate) or ''})
end

local sent_before = load_job(id)
if sent_before then return answer('created', sent_before) end

if idem ~= '' then
  local known = call('HMGET', idem, 'job', 'body')
  local job = known[1] and load_job(known[1])
  if job then
    if known[2] ~= ARGV[12] then return refuse('conflict', 0) end
    return answer('known', job)
  end
end

local waiting = 0
for _, count in ipairs(call('HVALS', t .. ':waiting')) do waiting = waiting + count end
if waiting >= tonumber(ARGV[13]) then return refuse('full', waiting) end
local of_user = tonumber(call('HGET', t .. ':waiting_of', owner) or 0)
if of_user >= tonumber(ARGV[14]) then return refuse('user_full', of_user) end
local unsaved = call('XLEN', t .. ':usage')
if unsaved >= tonumber(ARGV[15]) then return refuse('unsaved', unsaved) end

for i, rate in ipairs(rates) do
  local requests, tokens = left[i].requests or 1, left[i].tokens or math.huge
  if requests < 1 or tokens < math.min(rate[3], tonumber(ARGV[5])) then return refuse('limited', i - 1) end
end
for i, rate in ipairs(rates) do pour(rate, left[i], -1, -ARGV[5]) end

call('HSET', job_key(id), 'state', 'waiting', 'owner', owner, 'prio', prio, 'weight', ARGV[4], 'estimate', ARGV[5],
  'max', ARGV[6], 'spec', ARGV[7], 'title', ARGV[8], 'ttl', ARGV[9], 'idem', idem, 'created', now,
  'arrival', call('INCR', t .. ':arrivals'), 'attempt', 0, 'deaths', 0, 'n', 0, 'bytes', 0)
if #rates > 0 then call('HSET', job_key(id), 'rates', ARGV[16], 'charged', ARGV[5]) end
if idem ~= '' then
  call('DEL', idem)
  call('HSET', idem, 'job', id, 'body', ARGV[12])
end
move_times()
if ARGV[10] ~= '' then call('ZADD', t .. ':deadlines', now + ARGV[10], id) end
local job = load_job(id)
enqueue(job)
publish()
return answer('created', job)
