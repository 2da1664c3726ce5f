-- A log without token ids, as AIME's workers write it, cannot be gone on with: where its writer loses the job, it begins anew. ':job:' anew
-- counts how often that was, so that readers know; 'text' is the hash of a text that was written without ids.
local function start_anew(job)
  if job.n > 0 then call('HINCRBY', job_key(job.id), 'anew', 1) end
  call('DEL', log_key(job.id))
  call('HDEL', job_key(job.id), 'text', 'first', 'progress', 'result')
  call('HSET', job_key(job.id), 'n', 0, 'bytes', 0)
  job.n, job.base, job.text = 0, 0, false
  tell(job.id)
end
