/* libopd-embedded: the daemon inside this process, behind the address "embedded:".
 *
 * Layer: client/embedded, public (installed as opd/embedded.h); on top of both libopd and the server.
 * Threads: opd_embedded_register from any thread, once or more. Each opd_connect("embedded:…") starts a daemon of its own (its loop thread and lane) that ends
 * with the client; "embedded:/path/opd.yaml" reads a configuration file. The client is an administrator of it. */
#ifndef OPD_EMBEDDED_H
#define OPD_EMBEDDED_H

#ifdef __cplusplus
extern "C" {
#endif

__attribute__((visibility("default"))) void opd_embedded_register(void);

#ifdef __cplusplus
}
#endif
#endif
