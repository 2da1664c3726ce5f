-- One exchange with a worker: frames in, lease renewed, jobs out.
-- ARGV: session, key, turn, room, lease, most jobs per answer, telemetry, linger of whole batches, pairs held, then (job, attempt) of each,
--       then 5 of each frame: head (below), ids, texts, logprobs or '', error detail
-- → {'lapsed'}, {'stale'} or {'ok', jobs, drops, expects, drain, ms after which to come again for a batch that is filling}

local session, turn, room = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4])
local login = table_of(call('HGETALL', session_key(session)))
if login.key ~= ARGV[2] then return {'lapsed'} end
local last_turn = tonumber(login.turn)
if turn < last_turn then return {'stale'} end -- overtaken by a later turn: nobody reads this answer

use_reserve()
move_times()
call('ZADD', t .. ':sessions', now + ARGV[5], session)

local held = table_of(call('HGETALL', held_key(session)))
local drops, expects, known = {}, {}, {}

local function drop(job, attempt)
  local pair = job .. ' ' .. attempt
  if not known[pair] then
    known[pair] = true
    drops[#drops + 1] = {job, attempt}
  end
end

-- Frames.
local pairs_held = tonumber(ARGV[9])
-- attempt, offset, count, bytes of texts, prompt tokens or '', messages dropped or '', ending or '', job
local HEAD = '^(%S+) (%S+) (%S+) (%S+) (%S*) (%S*) (%S*) (.*)$'
local released = false
for at = 10 + 2 * pairs_held, #ARGV, 5 do
  local frame = {ids = ARGV[at + 1], texts = ARGV[at + 2], logprobs = ARGV[at + 3], detail = ARGV[at + 4]}
  local attempt, offset, count, bytes, prompt_tokens, dropped, ending, job = string.match(ARGV[at], HEAD)
  frame.job, frame.attempt, frame.prompt_tokens, frame.dropped, frame.ending = job, attempt, prompt_tokens, dropped, ending
  frame.offset, frame.count, frame.bytes = tonumber(offset), tonumber(count), tonumber(bytes)
  if held[frame.job] == frame.attempt then
    local ended, expected = append(frame)
    if ended then held[frame.job] = nil end
    if expected then expects[#expects + 1] = {frame.job, expected} end
    released = released or frame.ending == 'release'
  else
    drop(frame.job, frame.attempt)
  end
end
if appended > 0 then call('HINCRBY', t .. ':totals', 'tokens', appended) end

-- What the worker has and should not, and the other way round.
local has = {}
for i = 10, 9 + 2 * pairs_held, 2 do
  local job, attempt = ARGV[i], ARGV[i + 1]
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
    if held[job] then jobs[#jobs + 1] = job end
  end
else
  for i, job in ipairs(lacks) do
    if i <= room then
      jobs[i] = job
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

call('HSET', session_key(session), 'turn', turn, 'room', room, 'sent', table.concat(jobs, ' '))
if ARGV[7] ~= '' then call('HSET', session_key(session), 'telemetry', ARGV[7]) end
publish()

local replies = {}
for i, job in ipairs(jobs) do replies[i] = job_reply(job) end
return {'ok', replies, drops, expects, login.drain and 1 or 0, fill}
