# cmake -DPROGRAM=... -DEXPECTED=... -P run.cmake: runs an example on an etcd in memory; it must
# succeed, and print what stands in the file EXPECTED.
execute_process(COMMAND ${PROGRAM} OUTPUT_VARIABLE printed RESULT_VARIABLE result)
message("${printed}")
if(result)
  message(FATAL_ERROR "it has ended with ${result}")
endif()
file(READ ${EXPECTED} expected)
if(NOT printed STREQUAL expected)
  message(FATAL_ERROR "and not as expected:\n${expected}")
endif()
