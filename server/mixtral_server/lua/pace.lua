-- How jobs left their slots: sums over about the last RATE_MS, each finish weighing less with age, from the first lease after a quiet time.
-- value: finishes; gaps: squares of the times between them, ms²; run: times from first lease to end, ms.

-- → finishes per ms, how many they were, squared coefficient of variation of the gaps, mean run in ms; or nil when there is nothing to
-- measure.
local function pace()
  local sums = call('HMGET', t .. ':rate', 'value', 'gaps', 'run', 'at', 'since')
  if not sums[1] then return nil end
  local fade = math.exp(-(now - sums[4]) / RATE_MS)
  local value = sums[1] * fade
  if value < 0.05 then return nil end
  local span = RATE_MS * (1 - math.exp(-math.max(1000, now - sums[5]) / RATE_MS))
  local variation = (sums[2] or 0) * fade * value / (span * span) - 1
  return value / span, value, math.min(10, math.max(0.1, variation)), (sums[3] or 0) / sums[1]
end

-- Jobs per second as text, '' when there is nothing to measure.
local function finish_rate()
  local rate = pace()
  return rate and string.format('%.9f', rate * 1000) or ''
end
