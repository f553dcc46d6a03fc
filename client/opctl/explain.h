/* An explain record, for people and as JSON.
 *
 * Layer: client/opctl. Threads: one. */
#ifndef OPCTL_EXPLAIN_H
#define OPCTL_EXPLAIN_H

#include <cjson/cJSON.h>

#include "opd/client.h"

/* `ran`: it has times. */
void explain_print(const opd_explain *explain, bool ran);
cJSON *explain_json(const opd_explain *explain, bool ran);

#endif
