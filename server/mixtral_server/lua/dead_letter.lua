-- The letter of a job is taken out of ':dead'. Returns whether there was one.
local function take_letter(id)
  for _, entry in ipairs(call('XRANGE', t .. ':dead', '-', '+')) do
    if table_of(entry[2]).job == id then return call('XDEL', t .. ':dead', entry[1]) == 1 end
  end
  return false
end
