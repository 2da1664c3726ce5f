-- A job is queued, once, however often this is called with its id; or several, all of them or none.
-- ARGV: id, owner, priority, weight, estimate, max tokens, request, title, ttl, queue timeout or '', idempotency field or '',
--       body hash, most waiting, most waiting of one user, most tokens waiting, most of one user, most unsaved rows, rates as JSON or '',
--       key or '', most running of the key, ageing, whether only native workers can serve them; then of each other job: id, estimate,
--       max tokens, request
-- → {what the rates' buckets hold: {requests, tokens} of each, then {outcome, id, state, position, median and 90th percentile of the
--    wait, ids of the others} or {refusal, …}; of 'limited' the number of the rates before the one that refused}

local id, owner, prio = ARGV[1], ARGV[2], ARGV[3]
local idem = ARGV[11] ~= '' and t .. ':idem:' .. owner .. ':' .. ARGV[11] or ''
local wanted, estimate = {{id = id, estimate = ARGV[5], max = ARGV[6], spec = ARGV[7]}}, tonumber(ARGV[5])
local others, before_last = {}, 0 -- ids; tokens of all but the last job
local FIRST_OTHER = 23
for i = FIRST_OTHER, #ARGV, 4 do
  others[#others + 1] = ARGV[i]
  wanted[#wanted + 1] = {id = ARGV[i], estimate = ARGV[i + 1], max = ARGV[i + 2], spec = ARGV[i + 3]}
  before_last, estimate = estimate, estimate + ARGV[i + 1]
end

local rates, left = ARGV[18] ~= '' and cjson.decode(ARGV[18]) or {}, {}
for i, rate in ipairs(rates) do left[i] = look_into(rate) end

local function with_rates(reply)
  local held = {}
  for i = 1, #rates do held[i] = {tostring(left[i].requests or ''), tostring(left[i].tokens or '')} end
  return {held, reply}
end

local function answer(outcome, job, beside)
  local place = place_reply(job)
  return {outcome, job.id, job.state, place[1], place[2], place[3], beside}
end

if call('EXISTS', job_key(id)) == 1 then return with_rates(answer('created', load_job(id), others)) end

if idem ~= '' then
  local known = call('HMGET', idem, 'job', 'body', 'others')
  local job, beside, is_whole = known[1] and load_job(known[1]), {}, true
  for other in string.gmatch(known[3] or '', '%S+') do
    beside[#beside + 1] = other
    is_whole = is_whole and call('EXISTS', job_key(other)) == 1
  end
  if job and is_whole then
    if known[2] ~= ARGV[12] then return with_rates({'conflict'}) end
    return with_rates(answer('known', job, beside))
  end
end

-- Up to the bounds all are taken. Beyond them who has more than an equal share of the bounds is refused, up to twice the bounds; who has
-- nothing waiting, up to three times. Of several jobs the last is judged, as if the others waited already.
local waiting = #others
for _, jobs in ipairs(call('HVALS', t .. ':waiting')) do waiting = waiting + jobs end
local of_user = tonumber(call('HGET', t .. ':waiting_of', owner) or 0) + #others
local tokens = call('HMGET', t .. ':tokens_of', '', owner)
local of_all, tokens_of_user = (tokens[1] or 0) + before_last, (tokens[2] or 0) + before_last
local users = call('HLEN', t .. ':waiting_of') + (of_user == #others and 1 or 0)
local fill = math.max(waiting / ARGV[13], of_all / ARGV[15])
local share = math.max(of_user / ARGV[13], tokens_of_user / ARGV[15]) * users
local refusal
if of_user >= tonumber(ARGV[14]) then
  refusal = 'user_jobs'
elseif of_user > 0 and tokens_of_user >= tonumber(ARGV[16]) then
  refusal = 'user_tokens'
elseif fill >= 1 and not (share < 1 and fill < 2 or of_user == 0 and fill < 3) then
  refusal = waiting >= tonumber(ARGV[13]) and 'jobs' or 'tokens'
end
if refusal then
  return with_rates({
    refusal, waiting - #others, of_all - before_last, of_user - #others, tokens_of_user - before_last, users, finish_rate(),
  })
end
local unsaved = call('XLEN', t .. ':usage')
if unsaved >= tonumber(ARGV[17]) then return with_rates({'unsaved', unsaved}) end

for i, rate in ipairs(rates) do
  local requests, tokens = left[i].requests or math.huge, left[i].tokens or math.huge
  if requests < math.min(rate[2], #wanted) or tokens < math.min(rate[3], estimate) then return with_rates({'limited', i - 1}) end
end
for i, rate in ipairs(rates) do pour(rate, left[i], -#wanted, -estimate) end

move_times()

-- → the answer
local function queue(one, idem_of_job)
  local arrival = math.max(read_clock().now, clock.last + 1)
  clock.now, clock.last, clock.ageing = arrival, arrival, tonumber(ARGV[21])
  call('HSET', t .. ':clock', 'last', arrival, 'ageing', ARGV[21])
  local due = string.format('%.0f', arrival + prio * clock.ageing) -- text: Redis is told it more than once
  call('HSET', job_key(one.id), 'state', 'waiting', 'owner', owner, 'prio', prio, 'weight', ARGV[4], 'estimate', one.estimate,
    'max', one.max, 'spec', one.spec, 'title', ARGV[8], 'ttl', ARGV[9], 'idem', idem_of_job, 'key', ARGV[19], 'most', ARGV[20],
    'created', now, 'due', due, 'attempt', '0', 'deaths', '0', 'n', '0', 'bytes', '0')
  if #rates > 0 then call('HSET', job_key(one.id), 'rates', ARGV[18], 'charged', one.estimate) end
  if ARGV[22] == '1' then call('HSET', job_key(one.id), 'native', 1) end
  if ARGV[10] ~= '' then call('ZADD', t .. ':deadlines', now + ARGV[10], one.id) end
  local job = {
    id = one.id, state = 'waiting', owner = owner, prio = prio, weight = tonumber(ARGV[4]), due = due,
    estimate = tonumber(one.estimate), deaths = 0, n = 0, key = ARGV[19], native = ARGV[22] == '1',
  }
  enqueue(job, ARGV[20])
  local said = answer('created', job, others)
  if said[5] then call('HSET', job_key(one.id), 'eta', said[5], 'eta_p90', said[6]) end
  return said
end

local said = queue(wanted[1], idem)
for i = 2, #wanted do queue(wanted[i], '') end
if idem ~= '' then
  call('DEL', idem)
  call('HSET', idem, 'job', id, 'body', ARGV[12], 'others', table.concat(others, ' '))
end
conclude()
return with_rates(said)
