/* What the parts of the codec share: readers check protobuf's structs and turn them into messages, writers do the way back.
 *
 * Layer: proto, private to codec*.c. Threads: pure but for the arena.
 * Not here: anything for callers (proto/codec.h). */
#ifndef OPD_PROTO_CODEC_INTERNAL_H
#define OPD_PROTO_CODEC_INTERNAL_H

#include "opd.pb-c.h"

#include "proto/bounds.h"
#include "proto/codec.h"

/* Decoding one envelope. */
struct reader {
	struct arena *arena;
	opd_error *error;
};

/* The arena ran out. */
opd_status read_full(struct reader *reader);

/* A text of at most `bound` bytes, UTF-8 without NUL; `field` names it in errors. What protobuf-c unpacked has a NUL behind its
 * last byte (the codec's allocator puts it there), so nothing is copied. */
OPD_MUST_USE opd_status read_text(struct reader *reader, const char *field, ProtobufCBinaryData in, size_t bound,
                                  struct msg_text *out);

/* At most `count_bound` of them. */
OPD_MUST_USE opd_status read_texts(struct reader *reader, const char *field, size_t count, const ProtobufCBinaryData *in,
                                   size_t count_bound, size_t bound, uint32_t *count_out, const struct msg_text **out);

/* count is at most bound; "run: 100000 args, at most 256". */
OPD_MUST_USE opd_status read_count(struct reader *reader, const char *field, size_t count, size_t bound);

OPD_MUST_USE opd_status read_ints(struct reader *reader, const char *field, size_t count, const int64_t *in, size_t bound,
                                  uint32_t *count_out, const int64_t **out);

OPD_MUST_USE opd_status read_dtype(struct reader *reader, const char *field, int32_t number, opd_dtype *out);
OPD_MUST_USE opd_status read_tensor(struct reader *reader, const Opd__V1__Tensor *in, struct msg_tensor *out);
OPD_MUST_USE opd_status read_tensors(struct reader *reader, const char *field, size_t count, Opd__V1__Tensor *const *in,
                                     uint32_t *count_out, struct msg_tensor **out);
OPD_MUST_USE opd_status read_args(struct reader *reader, size_t count, Opd__V1__Argument *const *in, uint32_t *count_out,
                                  struct msg_arg **out);

/* A number that no status has is UNKNOWN, as gRPC has it. */
opd_status read_status(uint32_t number);

/* Unpacks with memory from the arena; NULL with the error filled in (and its status in *status_out). */
void *codec_unpack(struct reader *reader, const ProtobufCMessageDescriptor *descriptor, const char *name, const uint8_t *envelope,
                   size_t bytes, opd_status *status_out);

/* Writers return NULL (or false) when the arena is full; codec_pack turns that into the error. */
void *write_new(struct arena *arena, const ProtobufCMessageDescriptor *descriptor);
OPD_MUST_USE bool write_texts(struct arena *arena, uint32_t count, const struct msg_text *in, size_t *count_out,
                              ProtobufCBinaryData **out);
Opd__V1__Tensor *write_tensor(struct arena *arena, const struct msg_tensor *in);
OPD_MUST_USE bool write_tensors(struct arena *arena, uint32_t count, const struct msg_tensor *in, size_t *count_out,
                                Opd__V1__Tensor ***out);
OPD_MUST_USE bool write_args(struct arena *arena, uint32_t count, const struct msg_arg *in, size_t *count_out,
                             Opd__V1__Argument ***out);
Opd__V1__Handle *write_handle(struct arena *arena, struct msg_handle in);

/* codec_kept.c: uploads, writes, fetches, the list of kept tensors. */
OPD_MUST_USE opd_status read_upload(struct reader *reader, const Opd__V1__Upload *in, struct msg_upload *out);
OPD_MUST_USE opd_status read_write(struct reader *reader, const Opd__V1__Write *in, struct msg_write *out);
OPD_MUST_USE opd_status read_fetch(struct reader *reader, const Opd__V1__Fetch *in, struct msg_fetch *out);
OPD_MUST_USE opd_status read_kept_tensors(struct reader *reader, const Opd__V1__KeptTensors *in, struct msg_reply *out);
OPD_MUST_USE bool write_kept_request(struct arena *arena, const struct msg_request *in, Opd__V1__Request *out);
Opd__V1__KeptTensors *write_kept_tensors(struct arena *arena, const struct msg_reply *in);
Opd__V1__NodeOutput *write_node_output(struct arena *arena, struct msg_node_output in);

/* codec_request.c's, for codec_graph.c. */
OPD_MUST_USE opd_status read_list(struct reader *reader, const Opd__V1__ProviderList *in, struct msg_list *out);
OPD_MUST_USE opd_status read_output_options(struct reader *reader, size_t count, Opd__V1__OutputOption *const *in, struct msg_run *out);
OPD_MUST_USE opd_status read_mode(struct reader *reader, int mode, msg_mode *out);
OPD_MUST_USE opd_status read_service_class(struct reader *reader, int class, uint32_t *out);
/* NULL also for a list that isn't there; *fits_out tells. */
Opd__V1__ProviderList *write_list(struct arena *arena, const struct msg_list *in, bool *fits_out);
OPD_MUST_USE bool write_output_options(struct arena *arena, const struct msg_run *in, size_t *count_out, Opd__V1__OutputOption ***out);

/* codec_reply_*.c's, for codec_graph.c. */
OPD_MUST_USE opd_status read_explain(struct reader *reader, const Opd__V1__Explain *in, struct msg_explain *out);
Opd__V1__Explain *write_explain(struct arena *arena, const struct msg_explain *in);

/* codec_memory.c */
void read_shared(const Opd__V1__SharedRange *in, struct msg_shared_range *out); /* NULL: none */
OPD_MUST_USE bool write_memory_request(struct arena *arena, const struct msg_request *in, Opd__V1__Request *out);
OPD_MUST_USE bool write_memory_reply(struct arena *arena, const struct msg_reply *in, Opd__V1__Reply *out);
Opd__V1__SharedRange *write_shared(struct arena *arena, uint32_t region, uint64_t offset, uint64_t bytes); /* codec_tensor.c's */

/* codec_graph.c */
OPD_MUST_USE opd_status read_graph(struct reader *reader, const Opd__V1__Graph *in, struct msg_graph *out);
OPD_MUST_USE opd_status read_run_graph(struct reader *reader, const Opd__V1__RunGraph *in, struct msg_run *out);
OPD_MUST_USE opd_status read_graph_reply(struct reader *reader, const Opd__V1__RunReply *in, struct msg_run_reply *out);
Opd__V1__RegisterGraph *write_register_graph(struct arena *arena, const struct msg_graph *in);
Opd__V1__RunGraph *write_run_graph(struct arena *arena, const struct msg_run *in);
OPD_MUST_USE bool write_graph_reply(struct arena *arena, const struct msg_run_reply *in, Opd__V1__RunReply *out);

/* codec_publish.c: publications. */
OPD_MUST_USE opd_status read_publish(struct reader *reader, const Opd__V1__Publish *in, struct msg_publish *out);
OPD_MUST_USE opd_status read_open(struct reader *reader, const Opd__V1__OpenTensor *in, struct msg_open *out);
OPD_MUST_USE opd_status read_publications(struct reader *reader, const Opd__V1__Publications *in, struct msg_reply *out);
OPD_MUST_USE bool write_publish_request(struct arena *arena, const struct msg_request *in, Opd__V1__Request *out);
Opd__V1__Publications *write_publications(struct arena *arena, const struct msg_reply *in);

/* codec_sessions.c */
OPD_MUST_USE opd_status read_set_session(struct reader *reader, const Opd__V1__SetSession *in, struct msg_set_session *out);
OPD_MUST_USE opd_status read_sessions(struct reader *reader, const Opd__V1__Sessions *in, struct msg_sessions *out);
OPD_MUST_USE bool write_session_request(struct arena *arena, const struct msg_request *in, Opd__V1__Request *out);
Opd__V1__Sessions *write_sessions(struct arena *arena, const struct msg_sessions *in);
/* codec_stats.c */
OPD_MUST_USE opd_status read_stats(struct reader *reader, const Opd__V1__Stats *in, struct msg_stats *out);
Opd__V1__Stats *write_stats(struct arena *arena, const struct msg_stats *in);

/* Borrows: protobuf-c writes nothing through it. */
static inline ProtobufCBinaryData write_text(struct msg_text in)
{
	return (ProtobufCBinaryData){in.bytes, (uint8_t *)(uintptr_t)in.data};
}

/* Packs `message` (NULL: a writer found the arena full) behind FRAME_HEADER_BYTES of room. */
OPD_MUST_USE opd_status codec_pack(struct arena *arena, const ProtobufCMessage *message, const char *name,
                                   struct codec_buffer *out, opd_error *error);

#endif
