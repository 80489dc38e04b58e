// A gRPC service whose one method answers each message of a stream as it comes.
import grpc from '@grpc/grpc-js'
import { definition } from './chat-service.mjs'

const server = new grpc.Server()
server.addService(definition, {
  talk(call) {
    call.on('data', (m) => call.write({ text: m.text.toUpperCase() }))
    call.on('end', () => {
      const trailer = new grpc.Metadata()
      trailer.set('count', 'told')
      call.end(trailer)
    })
  },
})
server.bindAsync(`0.0.0.0:${process.argv[2]}`, grpc.ServerCredentials.createInsecure(), (err) => {
  if (err) throw err
})
