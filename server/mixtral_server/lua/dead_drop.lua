-- A job that was given up is forgotten, with its log and its letter. ARGV: job. → whether there was a letter or a dead job of that id.
local id = ARGV[1]
local had_letter = take_letter(id)
local job = load_job(id)
if not job or job.state ~= 'dead' then return had_letter and 1 or 0 end
if job.idem and job.idem ~= '' and call('HGET', job.idem, 'job') == id then call('DEL', job.idem) end
call('DEL', job_key(id), log_key(id))
return 1
