const Html = require('html-webpack-plugin')
module.exports = { mode: 'development', entry: './src/index.js', plugins: [new Html({ title: 'webpack' })], devServer: { port: 8080 } }
