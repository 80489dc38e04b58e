// The service of chat.mjs; JSON stands for protocol buffers, gRPC does not mind.
const pack = (m) => Buffer.from(JSON.stringify(m))
const unpack = (b) => JSON.parse(b.toString())

export const definition = {
  talk: {
    path: '/chat.Chat/Talk', requestStream: true, responseStream: true,
    requestSerialize: pack, requestDeserialize: unpack, responseSerialize: pack, responseDeserialize: unpack,
  },
}
