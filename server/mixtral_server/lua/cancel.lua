-- ARGV: job. The job ends at once, whoever holds it; its worker hears of it with its next turn. → state, or nothing.
local job = load_job(ARGV[1])
if not job then return false end
if not TERMINAL[job.state] then
  use_reserve()
  finish(job, 'cancelled', 'cancelled')
  conclude()
end
return job.state
