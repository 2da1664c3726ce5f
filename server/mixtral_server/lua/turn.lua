-- One exchange with a worker: frames in, lease renewed, jobs out.
-- ARGV: session, key, turn, room, lease, most jobs per answer, telemetry, linger of whole batches, the process that asks or '' if it does not
--       listen, job and attempt of each that it holds in one flat JSON array, and all frames, packed (below)
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

local held, held_flat = {}, call('HGETALL', held_key(session))
for i = 1, #held_flat, 2 do held[held_flat[i]] = number(held_flat[i + 1]) end
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
local frames, at = ARGV[11], 1

while at <= #frames do
  local job_size, attempt, offset, count, bytes, prompt_tokens, dropped, ending, ids_size, texts_size, logprobs_size, detail_size
  job_size, attempt, offset, count, bytes, prompt_tokens, dropped, ending, ids_size, texts_size, logprobs_size, detail_size, at =
    struct.unpack(HEAD, frames, at)
  local ids_at = at + job_size
  local texts_at = ids_at + ids_size
  local logprobs_at = texts_at + texts_size
  local detail_at = logprobs_at + logprobs_size
  local job, ids, texts = sub(frames, at, ids_at - 1), sub(frames, ids_at, texts_at - 1), sub(frames, texts_at, logprobs_at - 1)
  local logprobs = logprobs_size > 0 and sub(frames, logprobs_at, detail_at - 1) or ''
  local detail = detail_size > 0 and sub(frames, detail_at, detail_at + detail_size - 1) or ''
  at = detail_at + detail_size
  local mark = '-'
  if held[job] ~= attempt then
    drop(job, attempt)
  elseif ending == 0 and prompt_tokens < 0 and dropped < 0 and append_next(job, offset, count, bytes, ids, texts, logprobs) then
    mark = 'a'
  else
    local frame = {
      job = job, attempt = attempt, offset = offset, count = count, bytes = bytes, prompt_tokens = prompt_tokens, dropped = dropped,
      ending = ENDINGS[ending], ids = ids, texts = texts, logprobs = logprobs, detail = detail, mark = mark,
    }
    local ended, expected = append(frame)
    if ended then held[job] = nil end
    if expected then expects[#expects + 1] = {job, expected} end
    released = released or frame.ending == 'release'
    mark = frame.mark
  end
  marks[#marks + 1] = mark
end
count(t .. ':totals', 'tokens', appended)

-- What the worker has and should not, and the other way round.
local has = {}
local holding = cjson.decode(ARGV[10])
for i = 1, #holding, 2 do
  local job, attempt = holding[i], holding[i + 1]
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
if #frames + #holding + #jobs == 0 then wait_for_work() end -- before conclude(): what this turn gave back wakes it too
conclude()

return {
  'ok', replies, drops, expects, login.drain and 1 or 0, fill, table.concat(marks), '[' .. table.concat(news, ',') .. ']',
}
