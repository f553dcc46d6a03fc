#include <stdlib.h>

#include "client/address.h"
#include "client/opctl/print.h"
#ifdef OPCTL_EMBEDDED
#include "opd/embedded.h"
#endif

static opd_status connect_to(struct opctl *ctl, const char *address, opd_error *error)
{
	/* The daemon gets the time that was asked for, and a second to say that it is over: its words are better than "no answer
	 * yet". */
	const uint64_t timeout_us = ctl->timeout_us == 0 ? 0 : ctl->timeout_us + 1000000;
	opd_connect_options options = {.struct_bytes = sizeof options, .timeout_us = timeout_us, .client = "opctl " OPD_VERSION,
	                                     .shared_memory = options_has(&ctl->options, OPTION_SHM),
	                                     .rings = options_has(&ctl->options, OPTION_RINGS),
	                                     .token_file = ctl->options.values[OPTION_TOKEN_FILE],
	                                     .token = options_has(&ctl->options, OPTION_TOKEN_FILE) ? NULL : getenv("OPD_TOKEN"),
	                                     .ca_file = ctl->options.values[OPTION_CA],
	                                     .certificate_file = ctl->options.values[OPTION_CERT],
	                                     .key_file = ctl->options.values[OPTION_KEY],
	                                     .server_name = ctl->options.values[OPTION_SERVER_NAME],
	                                     .fingerprint = ctl->options.values[OPTION_FINGERPRINT]};
	int64_t poll_us;
	const opd_status status = options_int(&ctl->options, OPTION_POLL, 0, 1000000, 0, &poll_us, error);
	if (status != OPD_OK)
		return status;
	if (poll_us != 0 && !options.rings)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "--poll needs --rings");
	options.poll_us = (uint64_t)poll_us;
	return opd_connect(address, &options, &ctl->client, error);
}

static opd_status connect_embedded(struct opctl *ctl, const opd_error *why, opd_error *error)
{
#ifdef OPCTL_EMBEDDED
	const opd_status status = connect_to(ctl, "embedded:", error);
	if (status == OPD_OK) {
		ctl->embedded = true;
		print_note("no daemon answers (%s): running in this process", shown(why->text));
	}
	return status;
#else
	(void)ctl;
	return opd_fail(error, OPD_UNAVAILABLE, "no daemon answers: %s", why->text);
#endif
}

opd_status opctl_connect(struct opctl *ctl, connect_need need, opd_error *error)
{
#ifdef OPCTL_EMBEDDED
	opd_embedded_register();
#endif
	const char *asked = ctl->options.values[OPTION_CONNECT];
	if (asked == NULL)
		asked = getenv("OPD_ADDRESS");
	if (asked != NULL && asked[0] != '\0')
		return connect_to(ctl, asked, error);
	char address[512];
	opd_error why = {0};
	address_default(address, sizeof address);
	const opd_status status = connect_to(ctl, address, &why);
	if (status == OPD_OK)
		return OPD_OK;
	if (status != OPD_UNAVAILABLE) {
		*error = why;
		return status;
	}
	if (need == CONNECT_DAEMON)
		return opd_fail(error, OPD_UNAVAILABLE, "%s needs a daemon, and none answers: %s", ctl->options.positional[0], why.text);
	return connect_embedded(ctl, &why, error);
}

opd_status opctl_load_modules(struct opctl *ctl, opd_error *error)
{
	const char *path = ctl->options.values[OPTION_MODULE];
	return path == NULL ? OPD_OK : opd_load_module(ctl->client, path, error);
}
