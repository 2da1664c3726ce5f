-- A job that was given up waits again, in the place it had, as if no worker had died with it. Its log goes on after its former end, unless
-- it is without ids.
-- ARGV: job. → its state before, or nothing when there is no such job.
local id = ARGV[1]
local job = load_job(id)
if not job then return false end
if job.state ~= 'dead' then return job.state end
local times = lives(job) + 1
call('HSET', job_key(id), 'state', 'waiting', 'deaths', 0, 'retried', times .. ' ' .. job.n .. ' ' .. job.prompt_tokens)
if job.text then start_anew(job) end
call('HDEL', job_key(id), 'finish', 'error', 'ended', 'rates', 'charged')
call('XADD', log_key(id), job.n .. '-' .. 2 * times, 'retried', times)
for _, key in ipairs({job_key(id), log_key(id), job.idem}) do
  if key ~= '' then call('PERSIST', key) end
end
take_letter(id)
move_times()
enqueue(load_job(id))
tell(id)
conclude()
return 'dead'
