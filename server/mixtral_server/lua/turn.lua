-- One exchange with a worker: frames in, lease renewed, jobs out.
-- ARGV: session, key, turn, room, lease, most jobs per answer, telemetry, linger of whole batches, the process that asks or '' if it does not
--       listen, (job, attempt) of each held as JSON, heads of all frames (below) in one JSON array, and in one string ids, texts,
--       logprobs or '' and error detail of each frame
-- → {'lapsed'}, {'stale'} or {'ok', jobs, drops, expects, drain, ms after which to come again for a batch that is filling, a mark for each
--   frame ('a' appended, 'c' cut, '-' not), other news as JSON}

local session, turn, room = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4])
local login = table_of(call('HGETALL', session_key(session)))
if login.key ~= ARGV[2] then return {'lapsed'} end
local last_turn = tonumber(login.turn)
if turn < last_turn then return {'stale'} end -- overtaken by a later turn: nobody reads this answer

use_reserve()
move_times()
call('ZADD', t .. ':sessions', now + ARGV[5], session)

local held = table_of(call('HGETALL', held_key(session)))
for job, attempt in pairs(held) do held[job] = tonumber(attempt) end
local drops, expects, known = {}, {}, {}

local function drop(job, attempt)
  local pair = job .. ' ' .. attempt
  if not known[pair] then
    known[pair] = true
    drops[#drops + 1] = {job, attempt}
  end
end

-- Frames.
asker = ARGV[9]
is_heard = asker == '' or call('PUBSUB', 'NUMSUB', t .. ':live')[2] > 1
local marks, released = {}, false
local bodies, body_at = ARGV[12], 1

local function body(size)
  if size == 0 then return '' end
  body_at = body_at + size
  return string.sub(bodies, body_at - size, body_at - 1)
end

local heads = cjson.decode(ARGV[11])
for at = 1, #heads, 12 do
  local frame = {
    job = heads[at], attempt = heads[at + 1], offset = heads[at + 2], count = heads[at + 3], bytes = heads[at + 4],
    prompt_tokens = heads[at + 5], dropped = heads[at + 6], ending = heads[at + 7], ids = body(heads[at + 8]),
    texts = body(heads[at + 9]), logprobs = body(heads[at + 10]), detail = body(heads[at + 11]), mark = '-',
  }
  if held[frame.job] == frame.attempt then
    local ended, expected = append(frame)
    if ended then held[frame.job] = nil end
    if expected then expects[#expects + 1] = {frame.job, expected} end
    released = released or frame.ending == 'release'
  else
    drop(frame.job, frame.attempt)
  end
  marks[#marks + 1] = frame.mark
end
count(t .. ':totals', 'tokens', appended)

-- What the worker has and should not, and the other way round.
local has = {}
local holding = cjson.decode(ARGV[10])
for _, pair in ipairs(holding) do
  local job, attempt = pair[1], pair[2]
  if held[job] == attempt then has[job] = true else drop(job, attempt) end
end
local lacks, running = {}, 0
for job in pairs(held) do
  running = running + 1
  if not has[job] then lacks[#lacks + 1] = job end
end
table.sort(lacks)

-- Jobs. A worker that lost an answer gets its jobs again before any other; one that has no room for them any more gives them back.
local jobs, fill = {}, 0
local sent = turn == last_turn and login.sent or ''
if sent ~= '' then
  for job in string.gmatch(sent, '%S+') do
    if held[job] then jobs[#jobs + 1] = load_request(job) end
  end
else
  for i, job in ipairs(lacks) do
    if i <= room then
      jobs[i] = load_request(job)
    else
      requeue(load_job(job))
      held[job], running, released = nil, running - 1, true
    end
  end
  local free = math.min(room - #jobs, login.max_slots - running, ARGV[6] - #jobs)
  if free > 0 and not released and not login.drain then
    local batch = tonumber(login.static_batch)
    if batch then
      free = math.min(free, batch)
      fill = fill_ms(free, ARGV[8])
    end
    for _, job in ipairs(claim(session, fill > 0 and 0 or free, not held[login.suspect or ''])) do jobs[#jobs + 1] = job end
  end
end

local ids, replies = {}, {}
for i, job in ipairs(jobs) do ids[i], replies[i] = job.id, job_reply(job) end
call('HSET', session_key(session), 'turn', turn, 'room', room, 'sent', table.concat(ids, ' '))
if ARGV[7] ~= '' then call('HSET', session_key(session), 'telemetry', ARGV[7]) end
if #heads + #holding + #jobs == 0 then wait_for_work() end -- before conclude(): what this turn gave back wakes it too
conclude()

return {
  'ok', replies, drops, expects, login.drain and 1 or 0, fill, table.concat(marks), '[' .. table.concat(news, ',') .. ']',
}
