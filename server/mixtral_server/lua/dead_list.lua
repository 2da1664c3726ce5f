-- Jobs given up, newest first. ARGV: most. → {now, {job, owner, reason, worker, at, tokens} of each}; tokens is '' when nothing is left of the job.
local letters = {}
for i, entry in ipairs(call('XREVRANGE', t .. ':dead', '+', '-', 'COUNT', ARGV[1])) do
  local letter = table_of(entry[2])
  letters[i] = {letter.job, letter.owner, letter.reason, letter.worker, letter.at, call('HGET', job_key(letter.job), 'n') or ''}
end
return {now, letters}
