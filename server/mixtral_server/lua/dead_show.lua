-- What is left of a job that was given up. ARGV: job. → {state, request, priority, attempts, deaths, created, ids and texts of each log entry},
-- or nothing when there is no such job.
local values = call('HMGET', job_key(ARGV[1]), 'state', 'spec', 'prio', 'attempt', 'deaths', 'created')
if not values[1] then return false end
local log = {}
for _, entry in ipairs(call('XRANGE', log_key(ARGV[1]), '-', '+')) do
  local fields = table_of(entry[2])
  if fields.ids then log[#log + 1] = {fields.ids, fields.texts} end
end
values[7] = log
return values
