# Copies the .proto file IN to OUT with the type `string` replaced by `bytes`, comments left out. Run by proto/CMakeLists.txt.
file(READ ${IN} text)
string(REGEX REPLACE "//[^\n]*" "" text "${text}")
string(REGEX REPLACE "(^|[^A-Za-z0-9_.])string([ \t\n])" "\\1bytes\\2" text "${text}")
file(WRITE ${OUT} "${text}")
