-- Record and log in one step: read apart, a log that expires between the two would look empty.
-- ARGV: job, offset. → {record, entries that reach beyond offset}, or nothing when there is no such job.
local record = call('HMGET', job_key(ARGV[1]), 'state', 'owner', 'title', 'prio', 'created', 'attempt', 'n', 'finish', 'error',
  'prompt_tokens', 'started', 'first', 'ended', 'dropped', 'anew', 'text')
if not record[1] then return false end
return {record, call('XRANGE', log_key(ARGV[1]), (ARGV[2] + 1) .. '-0', '+')}
