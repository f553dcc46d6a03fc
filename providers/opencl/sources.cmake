# The kernels' sources as strings: sources.h, from kernels/*.cl. Called with OUT and FOLDER.
set(text "/* Made from kernels/ by sources.cmake. */\n")
foreach(name common norm elementwise softmax position product)
  file(READ ${FOLDER}/${name}.cl bytes HEX)
  string(REGEX REPLACE "(..)" "0x\\1," bytes "${bytes}")
  string(APPEND text "static const char source_${name}[] = {${bytes}0};\n")
endforeach()
string(APPEND text "static const char *const source_texts[] = {source_norm, source_elementwise, source_softmax, source_position, source_product};\n")
file(WRITE ${OUT} "${text}")
