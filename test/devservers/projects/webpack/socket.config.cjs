const base = require('./webpack.config.cjs')
module.exports = { ...base, devServer: { ...base.devServer, allowedHosts: ['.sbx.test'], client: { webSocketURL: 'auto://0.0.0.0:0/ws' } } }
