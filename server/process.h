/* The process that the daemon lives in: its standard files and its limits.
 *
 * Layer: server, beside main.c. Threads: any; process_open_standard_files before others open anything. */
#ifndef OPD_SERVER_PROCESS_H
#define OPD_SERVER_PROCESS_H

#include <stdbool.h>

/* Descriptors 0 to 2 exist from then on: a socket must not become the stderr that something prints to. */
void process_open_standard_files(void);

/* As many descriptors as the system allows. Where that fails the old limit stays, and the sessions that don't fit are refused. */
void process_raise_file_limit(void);

/* Core files: none at all, or as large as the system lets them be. The pages of tensors are never in one (tensors.c), but requests and small tensors would be. */
void process_limit_core(bool allowed);

#endif
