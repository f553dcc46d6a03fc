# opd_uuid(target name source...): a header uuid/<name>.h for the target, with OPD_UUID_<name> "<SHA-256 over the sources, in
# order>" (what `cat source... | sha256sum` prints), made again whenever one of them changes. It is how a result says which text its kernel was built from.
if(CMAKE_SCRIPT_MODE_FILE)
  execute_process(COMMAND cat ${SOURCES} COMMAND sha256sum OUTPUT_VARIABLE digest COMMAND_ERROR_IS_FATAL ANY)
  string(SUBSTRING "${digest}" 0 64 digest)
  file(WRITE ${OUT} "#define OPD_UUID_${NAME} \"${digest}\"\n")
  return()
endif()

set(OPD_UUID_SCRIPT ${CMAKE_CURRENT_LIST_FILE})
function(opd_uuid target name)
  set(sources "")
  foreach(source ${ARGN})
    list(APPEND sources ${CMAKE_CURRENT_SOURCE_DIR}/${source})
  endforeach()
  set(out ${CMAKE_CURRENT_BINARY_DIR}/uuid/${name}.h)
  add_custom_command(OUTPUT ${out}
    COMMAND ${CMAKE_COMMAND} "-DSOURCES=${sources}" -DNAME=${name} -DOUT=${out} -P ${OPD_UUID_SCRIPT}
    DEPENDS ${sources} ${OPD_UUID_SCRIPT} VERBATIM)
  # A target of its own: a rule for a file serves only targets of the folder that it stands in, and ours may be the parent's.
  add_custom_target(${target}_uuid_${name} DEPENDS ${out})
  add_dependencies(${target} ${target}_uuid_${name})
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_BINARY_DIR})
endfunction()
