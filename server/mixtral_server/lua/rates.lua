-- A rate is JSON: {name, requests a minute, tokens a minute}, 0 for no limit. Its two buckets hold a minute's worth at most and fill
-- evenly; a full one is not stored. A job is charged when it is put, its tokens by estimate, and what it really took is known at its end:
-- the rest goes back, or what it took beyond that becomes a debt.

local BUCKETS = {'requests', 'tokens'}

local function bucket_key(rate) return t .. ':bucket:' .. rate[1] end

-- What the rate's buckets hold now; nothing where there is no limit.
local function look_into(rate)
  local kept, left = call('HMGET', bucket_key(rate), 'requests', 'tokens', 'at'), {}
  for i, name in ipairs(BUCKETS) do
    local size = rate[i + 1]
    if size > 0 then left[name] = math.min(size, (kept[i] or size) + math.max(0, now - (kept[3] or now)) * size / 60000) end
  end
  return left
end

local function pour(rate, left, requests, tokens)
  local fields, full_ms = {'at', now}, 0
  local more = {requests = requests, tokens = tokens}
  for i, name in ipairs(BUCKETS) do
    local size = rate[i + 1]
    if left[name] then
      left[name] = math.min(size, left[name] + more[name])
      full_ms = math.max(full_ms, math.ceil((size - left[name]) * 60000 / size))
      fields[#fields + 1], fields[#fields + 2] = name, string.format('%.6f', left[name])
    end
  end
  call('DEL', bucket_key(rate))
  if full_ms > 0 then
    call('HSET', bucket_key(rate), unpack(fields))
    call('PEXPIRE', bucket_key(rate), full_ms)
  end
end
