-- ARGV: job. → {position, median and 90th percentile of the wait, ms}, or nothing when there is no such job.
local job = load_job(ARGV[1])
if not job then return false end
return place_reply(job)
