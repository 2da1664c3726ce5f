-- How jobs left their slots: sums over about the last RATE_MS, each finish weighing less with age, from the first lease after a quiet time.
-- value: finishes; gaps: squares of the times between them, ms²; run: times from first lease to end, ms.

-- → finishes per ms, how many they were, squared coefficient of variation of the gaps, mean run in ms; or nil when there is nothing to
-- measure.
local function pace()
  local rate = table_of(call('HGETALL', t .. ':rate'))
  if not rate.value then return nil end
  local fade = math.exp(-(now - rate.at) / RATE_MS)
  local value = rate.value * fade
  if value < 0.05 then return nil end
  local span = RATE_MS * (1 - math.exp(-math.max(1000, now - rate.since) / RATE_MS))
  local variation = (rate.gaps or 0) * fade * value / (span * span) - 1
  return value / span, value, math.min(10, math.max(0.1, variation)), (rate.run or 0) / rate.value
end

-- Jobs per second as text, '' when there is nothing to measure.
local function finish_rate()
  local rate = pace()
  return rate and string.format('%.9f', rate * 1000) or ''
end
